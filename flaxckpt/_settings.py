"""`Settings`: the arguments of `ModelCheckpoint`, each checked once.

`CheckpointState` and `Template` check theirs, and the rest is checked here. The default
values are in `ModelCheckpoint`.
"""

import difflib
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from flaxckpt._checkpoints.retention import LatestN, PreservationPolicy
from flaxckpt._decision.direction import mode_of
from flaxckpt._decision.reserved import ADVICE as NO_RESERVED
from flaxckpt._decision.reserved import is_reserved
from flaxckpt._decision.scalars import is_real
from flaxckpt._decision.state import CheckpointState
from flaxckpt._decision.template import Template
from flaxckpt._disk.info import Hook
from flaxckpt._object_store.scratch import mirrored
from flaxckpt._object_store.url import is_url
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.log import log_line
from flaxckpt._runtime.unchecked import as_arguments, unchecked
from flaxckpt._trees.chosen import Filter
from flaxckpt._trees.kinds_of_parts import Weights
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt.errors import SettingError

_SWITCHES = ("save_weights_only", "overwrite", "sync", "compress", "stop_on_error")
# What the error of an argument advises.
_ADVICE = {
    "verbose": "pass 0 or 1.",
    "max_to_keep": "pass a number of checkpoints of at least 1, or None for all.",
    "preserve": "pass a preservation policy, such as Orbax's LatestN(3).",
    **dict.fromkeys(_SWITCHES, "pass True or False."),
    "save_interval_secs": "pass a number of seconds above 0, or None.",
    "weights": "pass a function from a tree to its weights.",
    "snapshot": 'pass "auto", "device", "host" or "none".',
    "engine": 'pass "auto" or "orbax".',
    "max_in_flight": "pass a number of at least 1, or None.",
    "save_on_preemption": 'pass True, False or "flag".',
    "on_saved": "pass a function of a CheckpointInfo, or several in a list.",
    **dict.fromkeys(
        ("frozen", "per_process"),
        "pass a function of a leaf's path and the leaf, or a type of leaf.",
    ),
    "timeout_secs": "pass a number of seconds above 0.",
}
# Arguments of other libraries, and our arguments that do the same.
_ELSEWHERE = {
    "period": "save_freq",
    "every_n_train_steps": "save_freq",
    "every_n_epochs": "save_freq",
    "save_interval_steps": "save_freq",
    "train_time_interval": "save_interval_secs",
    "save_top_k": "preserve",
    "keep": "max_to_keep",
    "keep_period": "preserve",
    "preservation_policy": "preserve",
    "dirpath": "filepath",
    "filename": "filepath",
    "directory": "filepath",
    "best_mode": "mode",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """The arguments of a `ModelCheckpoint`, and what follows from them.

    `ModelCheckpoint` describes the arguments, and the errors of those that cannot work.
    """

    filepath: str | os.PathLike[str]
    monitor: str
    verbose: int
    save_best_only: bool
    save_weights_only: bool
    mode: str
    save_freq: str | int
    initial_value_threshold: float | None
    min_delta: float
    save_interval_secs: float | None
    max_to_keep: int | None
    preserve: PreservationPolicy | None
    overwrite: bool
    weights: Weights | None
    save_last: bool | str
    save_on_preemption: bool | str
    on_saved: Hook | Iterable[Hook] | None
    sync: bool
    snapshot: str
    max_in_flight: int | None
    compress: bool
    engine: str
    frozen: Filter | type | None
    per_process: Filter | type | None
    stop_on_error: bool
    timeout_secs: float

    def __post_init__(self) -> None:
        need, secs, preserve = self._need, self.save_interval_secs, self.preserve
        _ = self.template, self.fresh  # each checks the arguments that it is made of
        need("verbose", self.verbose in (0, 1))
        is_one = self.max_to_keep is None or preserve is None
        need("max_to_keep", is_one, "pass it or `preserve`, not both.")
        need("max_to_keep", _is_count(self.max_to_keep))
        is_object = not isinstance(preserve, type)
        is_policy = is_object and hasattr(preserve, "should_preserve")
        need("preserve", preserve is None or is_policy)
        for name in _SWITCHES:
            need(name, isinstance(getattr(self, name), bool | np.bool_))
        need("save_interval_secs", secs is None or _is_time(secs))
        need("timeout_secs", _is_time(self.timeout_secs))
        need("weights", self.weights is None or callable(self.weights))
        need("snapshot", self.snapshot in ("auto", "device", "host", "none"))
        need("engine", self.engine in ("auto", "orbax"))
        need("max_in_flight", _is_count(self.max_in_flight))
        need("save_on_preemption", self.save_on_preemption in (False, True, "flag"))
        for name in ("frozen", "per_process"):
            chosen = getattr(self, name)
            need(name, chosen is None or callable(chosen))
        kind = "compressed files" if self.compress else "files in an object store"
        is_linkable = self.frozen is None or not (self.compress or self.in_store)
        need("frozen", is_linkable, f"{kind} are not linked. Pass one of the two.")
        _ = self.slot, self.hooks  # which check `save_last` and `on_saved`
        if are_several():
            advice = "several processes save one tree at a time. Pass None."
            need("max_in_flight", self.max_in_flight in (None, 1), advice)
            advice = "several processes link no files. Pass None."
            need("frozen", self.frozen is None, advice)

    def _need(self, name: str, is_right: bool, advice: str = "") -> None:
        if not is_right:
            raise SettingError(name, getattr(self, name), advice or _ADVICE[name])

    # ---- what follows from them ------------------------------------------------------

    @property
    def in_store(self) -> bool:
        """Whether the checkpoints are in an object store."""
        return is_url(self.filepath)

    @functools.cached_property
    def template(self) -> Template:
        """The template of the checkpoints' paths; in a mirror for an object store."""
        if not self.in_store:
            return Template.parse(self.filepath)
        url = os.fspath(self.filepath)
        return Template.parse(mirrored(url), url)

    @functools.cached_property
    def fresh(self) -> CheckpointState:
        """A new decision state; other states must agree with its settings."""
        return self._state()

    def new_state(self, beside: PyTree = None) -> CheckpointState:
        """Return the decision state of a run that has seen nothing yet.

        Args:
            beside: Another argument of the programs that take the state.
        """
        with unchecked():
            state = self._state()
        return as_arguments(state, lambda: leaves_of(beside))

    def _state(self) -> CheckpointState:
        return CheckpointState.create(
            monitor=self.monitor,
            mode=self.mode,
            save_best_only=self.save_best_only,
            save_freq=self.save_freq,
            initial_value_threshold=self.initial_value_threshold,
            min_delta=self.min_delta,
        )

    def need_mode(self) -> None:
        """Check that the direction of `monitor` is known.

        Raises:
            SettingError: If it is not.
        """
        mode_of(self.monitor, self.mode)

    @functools.cached_property
    def goes_by_best_alone(self) -> bool:
        """Whether a check that finds no new best has nothing else to do."""
        return (
            bool(self.save_best_only and not self.save_last)
            and self.save_interval_secs is None
            and self.fresh.mode != "auto"
            and not self.verbose
            and not are_several()
        )

    @property
    def goes_by_clock(self) -> bool:
        """Whether time makes a check due, too."""
        return self.save_interval_secs is not None

    @functools.cached_property
    def clock_counts(self) -> bool:
        """Whether batches are counted though none makes a check due."""
        return self.goes_by_clock and self.by_epoch

    @functools.cached_property
    def by_epoch(self) -> bool:
        """Whether a check is due at the end of an epoch."""
        return self.save_freq == "epoch"

    @functools.cached_property
    def policy(self) -> PreservationPolicy | None:
        """The policy by which checkpoints are kept; None keeps all."""
        return self.preserve if self.max_to_keep is None else LatestN(self.max_to_keep)

    @functools.cached_property
    def slot(self) -> Path:
        """The preferred path of the slot for `save_last` and for a preemption."""
        given, need, root = self.save_last, self._need, Path(self.template.root)
        name = given if isinstance(given, str) else "last"
        is_name = name not in ("", ".", "..") and not {"/", "\0"} & {*name}
        need("save_last", is_name, "pass True, or a file's name.")
        need("save_last", not is_reserved(name), f"it is {NO_RESERVED}")
        path, is_taken = root / name, self.template.text == str(root / name)
        advice = f"the checkpoints themselves are saved at {str(path)!r}. Pass another "
        need("save_last", not (given and is_taken), f"{advice}name.")
        return root / "preempted" if is_taken else path

    @property
    def tell(self) -> Callable[[str], None] | None:
        """A function that logs or prints a message; None to be silent."""
        return log_line if self.verbose else None

    @functools.cached_property
    def hooks(self) -> tuple[Hook, ...]:
        """The functions of `on_saved`."""
        given = self.on_saved
        if given is None or callable(given):
            return () if given is None else (given,)
        is_several = isinstance(given, Iterable) and not isinstance(given, str)
        hooks = tuple(given) if is_several else ()
        self._need("on_saved", is_several and all(map(callable, hooks)))
        return hooks


def unknown_argument(name: str) -> str:
    """Return what an error says of an argument that `ModelCheckpoint` does not take."""
    known = [field.name for field in fields(Settings)]
    close = difflib.get_close_matches(name, known)
    meant = _ELSEWHERE.get(name) or next(iter(close), "")
    hint = f"Did you mean {meant!r}?" if meant else f"It takes {', '.join(known)}."
    return f"ModelCheckpoint got an unknown argument {name!r}. {hint}"


def _is_time(secs: float) -> bool:
    return is_real(secs) and 0 < secs < np.inf


def _is_count(number: int | None) -> bool:
    return number is None or (type(number) is int and number >= 1)
