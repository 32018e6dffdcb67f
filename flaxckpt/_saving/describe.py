"""`Describer`: what a call saves of a tree, described for the disk."""

import contextlib
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.write import Way
from flaxckpt._copies.ahead import Ahead
from flaxckpt._copies.plan import is_array, kinds_of
from flaxckpt._copies.programs import Kind
from flaxckpt._orbax.engine import storable
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.collector import paused_collector
from flaxckpt._runtime.frames import outside
from flaxckpt._saving.call import Call
from flaxckpt._saving.contents import Contents, StoredTree
from flaxckpt._settings import Settings
from flaxckpt._trees.chosen import Chosen
from flaxckpt._trees.describe import describe
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf, without_keys
from flaxckpt._trees.owned_shards import is_shared
from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.stored_weights import weights_skeleton
from flaxckpt._trees.ties import Flat, PyTree, flatten
from flaxckpt._trees.weights import are_unknown, default_weights
from flaxckpt.errors import SettingError

_STRUCTURES = 4  # so many structures of saved trees are remembered


class Describer:
    """Describes the trees of one series, and remembers their structures."""

    def __init__(self, settings: Settings, way: Way, ahead: Ahead) -> None:
        """Describe nothing yet.

        Args:
            settings: Tells what the weights are, and if the series gets them alone.
            way: How the trees are written.
            ahead: Prepares to copy a tree as soon as it is known.
        """
        self._weights = settings.weights or default_weights
        self._weights_only, self._ahead = bool(settings.save_weights_only), ahead
        self._forms, self._frozen = way.forms, way.frozen
        own = settings.per_process
        self._own = None if own is None else Chosen("per_process", own)
        self._located: deque[tuple[Layout, Skeleton]] = deque(maxlen=_STRUCTURES)
        self._known = Remembered[tuple[list[Kind | None], Layout]](_STRUCTURES)
        self._is_new_to_weights = True

    def describe(
        self,
        tree: PyTree,
        path: Path | None,
        *,
        skips: bool = False,
        to_slot: bool,
        is_traced: bool = False,
    ) -> Contents:
        """Describe what a call saves.

        Args:
            tree: What it was given.
            path: The path in the series, as far as it is known.
            skips: Whether the series gets nothing.
            to_slot: Whether the slot gets the whole tree.
            is_traced: Whether the tree's arrays are traced.

        Raises:
            SettingError: If there is no value to save, or if `frozen` or `per_process`
                chooses no leaf.
            UnsupportedLeafError: If a leaf cannot be saved.
        """
        whole = None
        if to_slot or not self._weights_only:
            whole = self._stored(tree, is_traced=is_traced)
        series = whole
        if skips and to_slot:
            series = None
        elif self._weights_only:
            picked = self._weights(tree)
            series = self._stored(picked, is_picked=True, is_traced=is_traced)
            self._warn_of_unknown(tree)
        contents = Contents(series, whole if to_slot else None, path)
        frozen = [index for stored in contents.trees for index in stored.frozen]
        if self._frozen is not None and not frozen:
            raise self._frozen.chosen.refuse_all(tree)
        has_own = is_traced or any(stored.own for stored in contents.trees)
        if self._own is not None and not has_own:
            raise self._own.refuse_all(
                tree, "arrays of all processes, which have one value"
            )
        return contents

    def prepare(self, tree: PyTree, *, will_save: bool = True) -> None:
        """Do now what the first save of such a tree would do before it can copy it.

        Describe the tree if it holds JAX arrays only, since that is remembered, and
        have the programs that copy it compiled in the background. In several processes
        on CPU, claim the memory of its copies there. Nothing happens if the user's
        function picks the weights: only saves call it.

        Args:
            tree: What will be saved, or `jax.ShapeDtypeStruct`s of it.
            will_save: Whether the program will save; after `restore` it may only read.
        """
        if self._weights_only and self._weights is not default_weights:
            return
        with contextlib.suppress(Exception):  # the save raises what is wrong
            saved = default_weights(tree) if self._weights_only else tree
            flat = flatten(saved)
            # Saves of weights may copy a second tree, so their memory is not known.
            claims_memory = will_save and not self._weights_only
            self._prepare_copies(flat.leaves, claims_memory=claims_memory)
            if all(map(is_array, flat.leaves)):
                layout, _, _ = self._described(saved, flat, is_traced=False)
                if self._weights is default_weights and not self._weights_only:
                    self._locate(saved, layout, flat)

    def _prepare_copies(
        self, leaves: Sequence[Any], *, claims_memory: bool = False
    ) -> None:
        if are_several():  # which copy the data of keys
            leaves = list(map(without_keys, leaves))
        self._ahead.prepare(leaves, claims_memory=claims_memory)

    def _stored(
        self, tree: PyTree, *, is_picked: bool = False, is_traced: bool
    ) -> StoredTree:
        """Describe a tree; if `is_picked`, all of it is weights."""
        flat = flatten(tree)
        with paused_collector():
            layout, leaves, kinds = self._described(tree, flat, is_traced=is_traced)
        if all(leaf.is_from_like for leaf in layout.leaves):
            raise _refusal_of_nothing(tree, is_picked=is_picked)
        weights = layout.skeleton if is_picked else self._locate(tree, layout, flat)
        frozen = [] if self._frozen is None else self._frozen.chosen.indices(tree)
        # Only one process saves from a running program.
        own = [] if self._own is None or is_traced else self._own.indices(tree)
        # Arrays of all processes are no process's own.
        own = [
            i for i in own if _is_value(layout.leaves[i]) and not is_shared(leaves[i])
        ]
        return StoredTree(layout, leaves, weights, frozen, own, kinds)

    def _described(
        self, tree: PyTree, flat: Flat, *, is_traced: bool
    ) -> tuple[Layout, list[Any], list[Kind | None]]:
        """Describe a tree: its layout, stored leaves and kinds.

        If an earlier tree had the same structure and kinds, and both held JAX arrays
        only, its layout is returned at once.
        """
        kinds = [] if is_traced else kinds_of(flat.leaves)
        are_arrays = bool(kinds) and None not in kinds
        known, layout = (are_arrays and self._known.get(flat.key)) or ([], None)
        if layout and known == kinds and not any([x.is_deleted() for x in flat.leaves]):
            return layout, flat.leaves, known
        if are_arrays and not self._weights_only:  # which may copy two trees at once
            self._prepare_copies(flat.leaves)
        layout, leaves = describe(tree, storable, is_traced=is_traced, flat=flat)
        if are_arrays:
            self._known.keep(flat.key, (kinds, layout))
        return layout, leaves, kinds

    def _locate(self, tree: PyTree, layout: Layout, flat: Flat) -> Skeleton:
        """Return where in a tree the weights are.

        `default_weights` looks only at the structure and the leaves, so what it finds
        is remembered. Layouts of one structure share one skeleton object.
        """
        if self._weights is not default_weights:
            return weights_skeleton(tree, self._weights, flat.leaves)
        for known, skeleton in self._located:
            if known.skeleton is layout.skeleton and known.leaves == layout.leaves:
                return skeleton
        with paused_collector():
            skeleton = weights_skeleton(tree, default_weights, flat.leaves)
        self._located.appendleft((layout, skeleton))
        return skeleton

    def _warn_of_unknown(self, tree: PyTree) -> None:
        """Warn once if `default_weights` leaves nothing out of a tree."""
        if self._is_new_to_weights and self._weights is default_weights:
            self._is_new_to_weights = False
            if are_unknown(tree):
                warnings.warn(
                    "save_weights_only=True leaves nothing out of this "
                    f"{type(tree).__name__}: no optimizer's state, PRNG keys or "
                    "metrics are known in it. Pass weights=lambda tree: tree if the "
                    "whole tree is weights. Otherwise pass a function that picks the "
                    "weights.",
                    stacklevel=outside(),
                )

    def take_up_frozen(self, contents: Contents, call: Call, *, may_stay: bool) -> None:
        """Note the frozen leaves of a save, once its job is claimed.

        Args:
            contents: What it saves.
            call: The call, which gets the leaves.
            may_stay: Whether a leaf that is stored already need not be copied. Another
                save that is under way may change where it is stored.
        """
        if self._frozen is None:
            return
        call.frozen, first = {}, 0
        for tree in contents.trees:
            stays = may_stay and self._forms.has(tree.layout, tree.leaves)
            for index in tree.frozen:
                leaf = tree.layout.leaves[index]
                if leaf.in_orbax and leaf.kind != "str":
                    value = tree.leaves[index]
                    call.frozen[first + index] = self._frozen.leaf(
                        value, is_known=stays
                    )
            first += len(tree.leaves)


def _refusal_of_nothing(tree: PyTree, *, is_picked: bool) -> SettingError:
    """Make the error for a tree that has no values to save."""
    is_short = tree is None or (isinstance(tree, dict | list | tuple) and not tree)
    shown = tree if is_short else f"<{type(tree).__name__}>"
    if is_picked:
        advice = (
            "these are the weights of the tree, and hold no array, number or text. "
            "Pass save_weights_only=False, or a `weights` that picks some."
        )
        return SettingError("weights(tree)", shown, advice)
    advice = (
        "it holds no array, number or text, so a checkpoint of it would be empty. If "
        "a filter made it, the filter matched nothing."
    )
    return SettingError("tree", shown, advice)


def _is_value(leaf: Leaf) -> bool:
    """Tell whether a leaf may have a value in some process; its text may be empty."""
    return leaf.in_orbax or leaf.kind == "bytes"
