"""`step` in plain Python, written to be read: what the tests hold it to."""

import math

import numpy as np


class Twin:
    """The decision, with branches and mutation."""

    def __init__(
        self,
        monitor,
        mode,
        save_best_only,
        save_freq,
        initial_value_threshold,
        min_delta,
        dtype=np.float32,
    ):
        self.monitor, self.mode = monitor, mode
        self.save_best_only, self.save_freq = save_best_only, save_freq
        self.dtype = dtype
        self.delta = self.rounded(min_delta)
        self.best = None
        if initial_value_threshold is not None:
            self.best = self.rounded(initial_value_threshold)
        self.seen, self.last = 0, None
        self.met, self.stale = None, 0

    def rounded(self, value):
        """Round to the dtype of the comparison, without numbers below the normal."""
        with np.errstate(all="ignore"):
            value = self.dtype(value)
        return self.dtype(0) if abs(value) < np.finfo(self.dtype).tiny else value

    def is_due(self, epoch, batch):
        if self.save_freq == "epoch":
            return batch is None
        if batch is None:
            return False
        if self.last is None or epoch != self.last[0] or batch <= self.last[1]:
            self.seen += batch + 1
        else:
            self.seen += batch - self.last[1]
        self.last = epoch, batch
        due = self.seen >= self.save_freq
        if due:
            self.seen %= self.save_freq
        return due

    def improves(self, value, best):
        if math.isnan(value):
            return False
        if best is None:
            return True
        with np.errstate(all="ignore"):
            if self.mode == "min":
                return value < self.rounded(best - self.delta)
            return value > self.rounded(best + self.delta)

    def step(self, logs, epoch, batch):
        if not self.is_due(epoch, batch):
            return False
        value = logs.get(self.monitor)
        if value is None:
            return not self.save_best_only
        value = self.rounded(value)
        if not self.save_best_only and math.isinf(value):
            value = np.copysign(np.finfo(self.dtype).max, value)
        improved = self.improves(value, self.best if self.save_best_only else self.met)
        self.stale = 0 if improved else self.stale + 1
        if improved and self.save_best_only:
            self.best = value
        elif improved:
            self.met = value
        return improved or not self.save_best_only
