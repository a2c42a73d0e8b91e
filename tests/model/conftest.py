from hypothesis import settings

# An example's time depends on what else the machine does; only its answer is tested here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
