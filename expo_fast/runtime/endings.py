"""Exceptions that end a run, with the exit status of each."""

import signal

COLLAPSED = 3  # exit status of a run that its alarms or its weights ended


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end.

    It is a KeyboardInterrupt, so that no `except Exception` of a library or a reward function
    takes it.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """128 + the number of the signal, as shells report it."""
        return 128 + self.signum

    @property
    def name(self) -> str:
        """The name of the signal, such as SIGTERM."""
        return signal.Signals(self.signum).name


class Collapsed(RuntimeError):
    """The run learns nothing any more, or its weights are not finite."""
