"""Every exception a caller may want to catch.

* GptOssError
  + CheckpointError      the files on disk are not what they claim to be
  + TokenizerError       a vocabulary is damaged, or is not the model's
  + BackendUnavailable   this machine cannot run the requested backend
  + ContextExceeded      more tokens than the model's context holds
  + CacheFull            no room for another token; the scheduler handles it
  + CacheMiss            the past that was asked for is no longer held; compute it again
  + Overloaded           more requests than may wait; try again later
  + GrammarError         a form asked of the answer cannot be held to
  + TrainingError        a run cannot begin or go on: its data, its directory, its loss
  + ToolUnavailable      a tool that was switched on cannot run here

A wrong argument is a plain ``ValueError``. A broken promise between our own
rooms is an ``assert``. A training run that a signal ends raises a ``KeyboardInterrupt``
(``train/stop.py``). Nothing else is raised on purpose.
"""


class GptOssError(Exception):
    """Base of everything this package raises on purpose."""


class CheckpointError(GptOssError):
    """The files on disk are not what they claim to be."""


class TokenizerError(GptOssError):
    """A vocabulary is damaged, or is not the one this model was trained with."""


class BackendUnavailable(GptOssError):
    """This machine cannot run the requested backend."""


class ContextExceeded(GptOssError):
    """More tokens than the model's context holds."""


class CacheFull(GptOssError):
    """No room for another token."""


class CacheMiss(GptOssError):
    """The past that was asked for is no longer held."""


class Overloaded(GptOssError):
    """More requests than may wait."""


class GrammarError(GptOssError):
    """A form asked of the answer (a schema, a grammar) cannot be held to."""


class ToolUnavailable(GptOssError):
    """A tool that was switched on cannot run here."""


class TrainingError(GptOssError):
    """A training run cannot begin or go on: its data, its directory, or its loss."""
