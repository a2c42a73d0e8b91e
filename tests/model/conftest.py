from hypothesis import settings

# How long an example takes depends on what else is running; only its answer is tested here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
