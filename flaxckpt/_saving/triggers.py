"""What makes a call save besides its own count: the clock, and a signal to end."""

from flaxckpt._decision.logs import Logs, find
from flaxckpt._processes.clock import AgreedInterval, Interval
from flaxckpt._processes.messages import Channel, are_several
from flaxckpt._processes.preemption import AgreedWatch, Watch
from flaxckpt._runtime.traces import runs_in_trace
from flaxckpt._settings import Settings
from flaxckpt.errors import CheckpointError


class Triggers:
    """The clock of `save_interval_secs` and the watch of `save_on_preemption`.

    Attributes:
        interval: The clock; None without `save_interval_secs`.
        watch: The watch; None without `save_on_preemption`.
        preempted: Whether a save for a signal is on disk.
    """

    def __init__(self, settings: Settings, series: str) -> None:
        """Install the handlers of signals; the interval begins at the first call.

        Args:
            settings: The settings.
            series: The series' name, the same in all processes.
        """
        self._settings = settings
        self.interval: Interval | None = None
        self.watch: Watch | AgreedWatch | None = None
        self.preempted = False
        several, secs = are_several(), settings.save_interval_secs
        if secs is not None and several:
            channel = Channel(f"{series} interval", settings.timeout_secs)
            self.interval = AgreedInterval(secs, channel=channel)
        elif secs is not None:
            self.interval = Interval(secs)
        if settings.save_on_preemption:
            self.watch = AgreedWatch() if several else Watch()

    def is_interval_over(self) -> bool:
        """Tell whether the interval is over.

        Raises:
            CheckpointError: If a trace is running.
        """
        if self.interval is None:
            return False
        if runs_in_trace():
            raise CheckpointError(
                "update was called in a running JAX trace (jit, scan...), where there "
                "is no clock for save_interval_secs. Call it between the parts of "
                "flaxckpt.scan_in_chunks, or go by save_freq alone."
            )
        return self.interval.is_over()

    def is_comparable(self, logs: Logs | None) -> bool:
        """Tell whether a check due by the clock compares, or only fills the slot.

        Within an epoch, `logs` often lack the monitored value.
        """
        has_value = find(logs or {}, self._settings.monitor) in (logs or {})
        only_best = self._settings.save_last and self._settings.save_best_only
        return has_value or not only_best

    def restart(self) -> None:
        """Begin the interval anew, after a save or a due check."""
        if self.interval is not None:
            self.interval.restart()

    def is_newly_preempted(self) -> bool:
        """Tell whether a signal has come for which no save is on disk yet."""
        watch = self.watch
        return watch is not None and not self.preempted and watch.look() is not None

    @property
    def signal(self) -> str:
        """The name of the signal that has come."""
        return str(self.watch and self.watch.signal)

    def late_signal(self) -> str:
        """Return a warning if a signal came and no state was saved for it.

        Otherwise return an empty text.
        """
        if not self.is_newly_preempted():
            return ""
        return (
            f"{self.signal} came after the last call of update or save outside "
            "of jit, so no state was saved for it. End the program now."
        )

    def close(self) -> None:
        """Give the handlers of signals back."""
        if self.watch is not None:
            self.watch.close()
