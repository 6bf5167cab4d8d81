"""What is served: versions of model and catalogue, swaps and rollbacks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from onerec.errors import DataError
from onerec.inference import Recommender
from onerec.inference.exported import ENGINE
from onerec.model.folder import CONFIG
from onerec.serving.answer import Version
from onerec.serving.config import ServeConfig
from onerec.tokenizer import Catalog


class NoEarlierVersion(Exception):
    """There is nothing to roll back to."""


class SwapUnderWay(Exception):
    """Another swap has not ended, or a rollback came while this one was loading."""


class Draining(Exception):
    """The server is stopping and takes no more requests."""


class Versions:
    """The version that is served, and those before it. Used from one event loop.

    A folder is loaded by a thread of its own, so that neither requests nor a rollback nor the end
    of the process wait for it: a folder on a file system that does not answer costs that thread.

    Args:
        recommender: What is served first.
        source: Its name.
        config: `keep_versions`, `swap_seconds`, `min_items_share` and `exports` of it.
        arm: Of the A/B split.
        on_change: Called with each version that is served from then on.
    """

    def __init__(
        self,
        recommender: Recommender,
        source: str,
        config: ServeConfig,
        *,
        arm: str = "a",
        on_change: Callable[[Version], None] = lambda _: None,
    ) -> None:
        self._config, self._on_change = config, on_change
        self._earlier: list[Version] = []
        self._loading: asyncio.Future[Recommender] | None = None
        self._closed = False
        self.now = Version(1, recommender, source, arm)
        on_change(self.now)

    async def swap(self, folder: str | Path, *, force: bool = False) -> Version:
        """Serves another export, or another catalogue with the same model, from the next batch on.

        Batches under way finish on the version that they began with. If anything is wrong with the
        folder, nothing changes.

        Args:
            folder: Of `onerec export`; without engine.bin and config.json, of `Catalog.save`.
            force: Take also a catalogue of other ids, of another quantizer, or with few items.

        Raises:
            SwapUnderWay: Another swap is loading, or a rollback came before this one was done.
            Draining: The server is stopping.
            FileNotFoundError: A file is missing.
            DataError: A file is broken or does not fit the others, the model finds nothing, the
                catalogue is another than was meant, or the folder took too long to load.
            ValueError: A catalogue that does not fit the model.
        """
        if self._closed:
            raise Draining("the server is stopping")
        if self._loading is not None:
            raise SwapUnderWay("another swap is under way")
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Recommender] = loop.create_future()
        self._loading = loaded
        before, seconds = self.now, self._config.swap_seconds
        thread = threading.Thread(
            target=_load,
            args=(loop, loaded, lambda: self._checked(Path(folder), before, force)),
            name="onerec-swap",
            daemon=True,
        )
        thread.start()
        try:
            async with asyncio.timeout(seconds):
                new = await loaded
        except TimeoutError:
            raise DataError(f"{folder}: not loaded after {seconds:g} seconds, given up") from None
        except asyncio.CancelledError:
            if self._closed:
                raise Draining("the server is stopping") from None
            if self._loading is not loaded:
                raise SwapUnderWay("a rollback came before the folder was loaded") from None
            raise
        finally:
            if self._loading is loaded:
                self._loading = None
        self._earlier.append(self.now)
        del self._earlier[: len(self._earlier) - self._config.keep_versions]
        return self._serve(new, str(folder))

    def rollback(self) -> Version:
        """Serves again what was served before the last swap, and gives up a swap that is loading.

        Raises:
            NoEarlierVersion: There is none in memory.
        """
        if not self._earlier:
            raise NoEarlierVersion("no earlier version is kept")
        self._give_up()
        before = self._earlier.pop()
        return self._serve(before.recommender, before.source)

    def close(self) -> None:
        """Ends a swap that is loading, and refuses more."""
        self._closed = True
        self._give_up()

    def _give_up(self) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.cancel()

    def _serve(self, recommender: Recommender, source: str) -> Version:
        self.now = Version(self.now.number + 1, recommender, source, self.now.arm)
        self._on_change(self.now)
        return self.now

    def _checked(self, folder: Path, before: Version, force: bool) -> Recommender:
        """What a folder holds, loaded, tried and held against what is served."""
        folder = self._allowed(folder)
        current = before.recommender
        # An export that is not there as a whole is not a catalogue for another network.
        if any((folder / name).exists() for name in (ENGINE, CONFIG)):
            new = Recommender.from_exported(
                folder, num_threads=current.num_threads, max_rows=current.max_rows
            )
        else:
            new = current.with_catalog(Catalog.load(folder))
            if not force:
                _check_quantizer(folder, current.catalog, new.catalog)
        new.warmup(beam_width=8)
        if not force:
            self._compare(folder, current.catalog, new.catalog)
        return new

    def _allowed(self, folder: Path) -> Path:
        """The folder, resolved. Its name is checked before anything below it is looked at."""
        if self._config.exports is None:
            return folder
        root, path = Path(self._config.exports).resolve(), folder.resolve()
        if root not in path.parents:
            raise DataError(f"{folder}: wanted a folder below {root}")
        return path

    def _compare(self, folder: Path, old: Catalog, new: Catalog) -> None:
        def kind(catalog: Catalog) -> str:
            return "strings" if catalog.item_ids.dtype == object else "integers"

        if kind(new) != kind(old):
            raise DataError(
                f"{folder}: item ids: wanted {kind(old)} as in the catalogue being served, got "
                f'{kind(new)}; "force": true takes it all the same'
            )
        least = self._config.min_items_share * len(old)
        if len(new) < least:
            raise DataError(
                f"{folder}: items: wanted at least {least:,.0f} ({self._config.min_items_share:g} "
                f'of the {len(old):,} being served), got {len(new):,}; "force": true takes it all '
                "the same"
            )


def _check_quantizer(folder: Path, old: Catalog, new: Catalog) -> None:
    """A network knows the codes of one quantizer; those of another are other items to it."""
    if old.quantizer and new.quantizer != old.quantizer:
        raise DataError(
            f"{folder}: quantizer: wanted {old.quantizer} as in the catalogue being served, got "
            f'{new.quantizer or "none"}; "force": true takes it all the same'
        )


def _load(
    loop: asyncio.AbstractEventLoop,
    loaded: asyncio.Future[Recommender],
    load: Callable[[], Recommender],
) -> None:
    """Runs in a thread; hands over what it found, if anybody still waits."""
    found: Recommender | Exception
    try:
        found = load()
    except Exception as error:
        found = error

    def settle() -> None:
        if loaded.done():
            return
        if isinstance(found, Exception):
            loaded.set_exception(found)
        else:
            loaded.set_result(found)

    with suppress(RuntimeError):  # the loop is gone, and with it whoever waited
        loop.call_soon_threadsafe(settle)
