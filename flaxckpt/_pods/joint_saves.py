"""What the processes do together in the background: they meet, agree and write.

Process 0 leads. In a save, the others tell it checksums of their accounts, and wait for
its word. It makes a directory, and each process writes its share there. Process 0
finishes the checkpoint, and tells the others the end. It sends one message at each
step, and hears one of each process. So the messages of a save grow with the number of
processes, and not with its square.
"""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.series_writer import Page
from flaxckpt._checkpoints.share import Share, Terms, write_share
from flaxckpt._checkpoints.together import Together
from flaxckpt._pods.agreement import (
    account_of,
    checksum_of,
    error_between,
    memories_of,
)
from flaxckpt._pods.own_values import lengths_of, rows_of, widths_for, with_rows
from flaxckpt._processes.messages import (
    Channel,
    Round,
    SilenceError,
    is_leader,
    process_index,
)
from flaxckpt._runtime.failures import space_told
from flaxckpt._saving.call import Call
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.job import nothing, translated
from flaxckpt._saving.parts import SaverParts
from flaxckpt.errors import CheckpointError, HookError

_PAGES = 2  # the most that a save writes: one in the series, and one in the slot
_PATIENCE = 20  # time-outs
# Settled once: by process 0 before the checkpoint gets its name, or by another process
# that has given up.
_END = "end"
# What the processes wait for, where process 0 may have an error to tell.
_AWAITED = ("go", *(f"where {index}" for index in range(_PAGES)), "done")
# What process 0 waits for, where another process may have given up.
_ASKED = ("seen", "check", "account", *(f"share {index}" for index in range(_PAGES)))


@dataclass
class _Agreed:
    """What all processes have agreed to write.

    Attributes:
        call: The call; None to write nothing.
        pages: Its pages.
        terms: How all processes write.
    """

    call: Call | None
    pages: list[Page]
    terms: Terms


class JointSaves:
    """The part of this process in the saves of all processes.

    Attributes:
        have_met: Whether all processes know that they have met.
    """

    def __init__(self, parts: SaverParts, timeout: float) -> None:
        """Meet nobody yet.

        Args:
            parts: The parts of the saver.
            timeout: How long to wait for another process, in seconds.
        """
        self._parts, self._area = parts, parts.series.area
        self._way = parts.publisher.disk.way
        self._channel = Channel(parts.series.name, timeout)
        self.have_met = False
        # Rounds that are over; process 0 deletes their messages at the next save.
        self._ended: list[Round] = []

    def translated(
        self, error: BaseException, path: Path | None = None
    ) -> CheckpointError:
        """Return an error of this process as all of them raise it."""
        return translated(error, self._parts.report.shown(path), _in_this_process())

    def _naming_process(
        self, error: BaseException, path: Path | None = None
    ) -> CheckpointError:
        """Return an error as `translated` does, with a note where it names nobody."""
        failure = self.translated(error, path)
        if failure is error and not getattr(failure, "__notes__", None):
            failure.add_note(f"It was raised{_in_this_process()}.")
        return failure

    def meet(self) -> None:
        """Take the lock, and check that all processes see the same directory.

        Raises:
            CheckpointError: If another run has the lock, or a process does not see what
                process 0 has made; the same in all processes.
        """
        exchange = self._channel.round()
        with self._channel.at_work():
            if is_leader():
                with self._telling_all(exchange):
                    self._parts.paths.take_lock(None)
                    with self._area.staging() as directory:
                        place = ""  # an object store is one to all
                        if not self._area.is_mirror:
                            root = self._parts.series.root
                            place = self._area.meeting_place(directory / "new", root)
                        exchange.tell("where 0", place)
                        exchange.hear_all("seen", first=1)
                    exchange.settle(_END, None)
                exchange.tell("done", None)
                self.have_met = True
                return
            with self._giving_up(exchange, self._note_meeting):
                place = exchange.hear("where 0")
                with self._telling(exchange, "seen"):
                    if place:
                        with self._area.share(place):
                            pass
                    exchange.tell("seen", None)
                exchange.hear("done")
                self._note_meeting()

    def _note_meeting(self) -> None:
        self.have_met = True

    def refuse(self, error: BaseException) -> None:
        """Tell the other processes of an error; run this in place of `write`.

        They raise the error, and nothing is saved. This process has raised it already,
        and waits for none of them: they may never come to this call.
        """
        exchange, failure = self._channel.round(), self._naming_process(error)
        if is_leader():
            self._tell_all(exchange, failure)
            self._ended.append(exchange)
        else:
            exchange.tell("check", failure)

    def write(self, contents: Contents) -> None:
        """Agree with the other processes, and write this process's part.

        Raises:
            CheckpointError: The error of any process; the same in all of them.
        """
        exchange = self._channel.round()
        with self._channel.at_work():
            if is_leader():
                with self._telling_all(exchange):
                    self._lead(exchange, self._agreed(exchange, contents))
                exchange.tell("done", None)
                return
            call, is_direct = None, True  # these stay if an error is suppressed
            with self._giving_up(exchange):
                agreed = self._agreed(exchange, contents)
                call = agreed.call
                is_direct = self._follow(exchange, agreed)
            if call is not None:
                self._parts.report.count_saved(is_direct=is_direct)

    def _agreed(self, exchange: Round, contents: Contents) -> _Agreed:
        """Compare what this process would write with what the others would write.

        Raises:
            CheckpointError: If they differ, or a process has failed.
        """
        call: Call | None = None
        account, rows, pages = dict[str, Any](), list[list[bytes]](), list[Page]()
        with self._telling(exchange, "check"):
            settled = self._parts.publisher.pages_to_write(contents, _no_check)
            call, pages = settled or (None, [])
            rows, shown = rows_of(pages), self._parts.report.shown
            paths = ["the last" if p.in_slot else shown(p.path) for p in pages]
            account = account_of(contents.calls[-1], pages, paths)
            facts = checksum_of(account), memories_of(pages), lengths_of(rows)
            exchange.tell("check", facts)
        if is_leader():
            checks = exchange.hear_all("check")
            while self._ended:  # all processes have come to this save
                self._ended.pop().forget()
            sums, memories, lengths = zip(*checks, strict=True)
            asked = next((i for i, each in enumerate(sums) if each != sums[0]), None)
            widths = widths_for(lengths) if asked is None else []
            divides = self._way.divides_replicas and not self._area.is_mirror
            # The chunks of compressed arrays are not known.
            spreads = divides and not self._way.compress and len(set(memories)) == 1
            exchange.tell("go", [asked, spreads, self._way.writes_directly, widths])
        asked, spreads, directly, widths = exchange.hear("go")
        if asked is not None:
            if asked == process_index():
                exchange.tell("account", account)
            if is_leader():
                raise error_between(account, asked, exchange.hear("account", asked))
            exchange.hear("done")  # raises the error
        triples = zip(pages, rows, widths, strict=True)
        terms = Terms(spreads, directly)
        return _Agreed(call, [with_rows(*each) for each in triples], terms)

    def _lead(self, exchange: Round, agreed: _Agreed) -> None:
        """Begin and finish the checkpoints; write this process's shares."""
        parts, call, pages = self._parts, agreed.call, agreed.pages
        if call is None:
            exchange.settle(_END, None)
            return
        begun = list[Path]()

        def begin(written: Path) -> Callable[[], list[Share]]:
            index = len(begun)
            begun.append(pages[index].path)
            place = self._area.meeting_place(written, pages[index].path)
            exchange.tell(f"where {index}", place)
            subject = f"share {index}"
            return lambda: list(map(Share.of_json, exchange.hear_all(subject, first=1)))

        def may_finish() -> None:
            exchange.settle(_END, None)

        parts.paths.take_lock(pages[0].path)
        parts.paths.checked(call, to_slot=any(page.in_slot for page in pages))
        together = Together(begin, may_finish, agreed.terms)
        try:
            with self._area.claim.turn:
                parts.publisher.put(call, pages, together)
        except CheckpointError:
            raise
        except Exception as error:
            path = begun[-1] if begun else pages[0].path
            raise self.translated(error, path) from error
        errors = parts.publisher.hooks.call()
        for other in errors[1:]:
            errors[0].add_note(f"And: {other}")
        if errors:  # all processes raise it, as any error of a save
            raise errors[0]

    def _follow(self, exchange: Round, agreed: _Agreed) -> bool:
        """Write this process's shares, and wait for the end.

        Returns:
            Whether the values were written straight from memory, not by Orbax.
        """
        publisher, is_direct = self._parts.publisher, True
        shown, who = self._parts.report.shown, _in_this_process()
        for index, page in enumerate(agreed.pages):
            place = self._hear_where(exchange, index)
            with self._telling(exchange, f"share {index}", page.path):
                with (
                    self._area.share(place) as here,
                    space_told(shown(page.path), page.layout.nbytes, here, who),
                ):
                    what = here, page.layout, page.leaves, self._way
                    share = write_share(*what, agreed.terms)
                publisher.note_fault(page.path, share.fault)
                is_direct = is_direct and share.is_direct
                exchange.tell(f"share {index}", share.to_json())
        try:
            exchange.hear("done")
        except HookError:  # process 0 has told `on_saved` of what is saved
            publisher.report.count_saved(is_direct=is_direct)
            raise
        return is_direct

    def _hear_where(self, exchange: Round, index: int) -> str:
        """Wait for the place of a page.

        Process 0 may be silent after it has settled the end of the page before. It then
        comes to this page, and waits for this process's share.
        """
        subject = f"where {index}"
        try:
            return exchange.hear(subject)
        except SilenceError as error:
            if not index:
                raise
            failure = self.translated(error)
            try:
                exchange.settle(_END, failure)
            except CheckpointError:
                raise error from None  # the save is given up
            return self._hear_patiently(exchange, subject, failure)

    # ---- errors ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _telling(
        self, exchange: Round, subject: str, path: Path | None = None
    ) -> Generator[None]:
        """Report an error in the block to process 0, and suppress it here.

        Process 0 then tells it to all processes, this one included.
        """
        try:
            yield
        except BaseException as error:
            failure = self._naming_process(error, path)
            exchange.tell(subject, failure, again=True)
            if not isinstance(error, Exception):
                raise

    @contextlib.contextmanager
    def _giving_up(
        self, exchange: Round, note_end: Callable[[], None] = nothing
    ) -> Generator[None]:
        """Settle the end if this process stops before process 0 has told it the end.

        Process 0 may be silent and yet alive. Once this process has settled the end,
        process 0 makes no checkpoint. If process 0 has settled it before, this process
        waits for its word, and suppresses the error if that is no error. An interrupt
        is never suppressed.

        Args:
            exchange: The exchange of messages.
            note_end: Is called if the word is no error, before an interrupt goes on.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, CheckpointError) and not isinstance(
                error, SilenceError
            ):
                raise  # process 0 has told it
            failure = self.translated(error)
            try:
                exchange.settle(_END, failure)
            except CheckpointError:
                for subject in _ASKED:
                    exchange.tell(subject, failure, again=True)
                if isinstance(error, Exception):
                    raise
                raise error from None
            self._hear_patiently(exchange, "done", failure)
            note_end()
            if not isinstance(error, Exception):
                raise

    def _hear_patiently(
        self, exchange: Round, subject: str, error: CheckpointError
    ) -> Any:
        """Wait on, while process 0 finishes a checkpoint and gives no sign."""
        for _ in range(_PATIENCE):
            with contextlib.suppress(SilenceError):
                return exchange.hear(subject)
        raise CheckpointError(
            f"{error} It had begun to finish the checkpoint, which may be there."
        ) from error

    @contextlib.contextmanager
    def _telling_all(self, exchange: Round) -> Generator[None]:
        """Tell all processes of an error within, whatever they wait for."""
        try:
            yield
        except BaseException as error:
            failure = self.translated(error)
            self._tell_all(exchange, failure)
            if not isinstance(error, Exception):
                raise
            raise failure from failure.__cause__
        finally:
            self._ended.append(exchange)

    def _tell_all(self, exchange: Round, failure: CheckpointError) -> None:
        for subject in _AWAITED:
            exchange.tell(subject, failure, again=True)


def _no_check(path: Path) -> None:
    """Check nothing: process 0 checks the paths when it writes."""


def _in_this_process() -> str:
    """Return the text that names this process at the end of an error's cause."""
    return f" (in process {process_index()})"
