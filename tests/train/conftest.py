import pytest


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the runs; what is drawn is looked at where it is the subject."""
    try:
        from gptoss.train import trainer
    except ImportError:
        return
    monkeypatch.setattr(trainer, "curves", lambda rows, path: None)


@pytest.fixture(scope="session")
def parameters():
    """Of a model that says yes or no."""
    from tests.train.coin import state

    return state()
