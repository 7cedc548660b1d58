"""Where the trials of a search lie, and what proposes them: the doors to Optuna, which is imported when used."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from secateur.errors import RecipeError, UnsupportedError
from secateur.search.front import Goals

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

STUDY, ABOUT = "secateur", "about"
BEAT, GRACE = 15, 60  # seconds between two signs of life of a worker, and without one until its trial is given up
LOCK = 0x5EC47E  # number of the lock under which tables are made
SOON = 0.5  # seconds until a worker looks again for what another one is making
WAIT = 60  # seconds that a worker waits for another one's write
Samplers = Literal["tpe", "nsga2", "random", "descent"]


def require_optuna() -> None:
    """Optuna, or an error that names the extra.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import_module("optuna")
    except ImportError as error:
        raise UnsupportedError("a search needs optuna", hint="pip install 'secateur[tune]'") from error


def opened(storage: str | Path, goals: Goals, about: str) -> Study:
    """The study of a search, made where it is missing; see `opened_first`."""
    return opened_first(storage, goals, about)[0]


def opened_first(storage: str | Path, goals: Goals, about: str) -> tuple[Study, bool]:
    """The study of a search, and whether it was made here: of workers that begin at once, by one of them.

    Raises:
        RecipeError: the storage holds a search for something else.
        UnsupportedError: it cannot be opened.
    """
    optuna = import_module("optuna")
    directions = ["maximize" if name in goals.higher else "minimize" for name in goals.names]
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        place, first = _storage(storage), True
        try:
            study: Study = optuna.create_study(study_name=STUDY, storage=place, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:
            assert place is not None  # a study in memory is always a new one
            study, first = optuna.load_study(study_name=STUDY, storage=place), False
    # Two that begin at once write the same; whoever comes with something else is refused.
    if study.user_attrs.get(ABOUT, about) != about:
        raise RecipeError(
            f"{storage} holds a search for something else",
            why="model, data, space and objectives decide what a result means, and one of them is another one",
            hint="Use another --out or storage, or the same as before.",
        )
    study.set_user_attr(ABOUT, about)
    return study, first


def _storage(storage: str | Path) -> BaseStorage | None:
    if not str(storage):
        return None
    optuna = import_module("optuna")
    if "://" not in str(storage):
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
    url = url_of(storage)
    # Without waiting a second worker would fail on the first one's write.
    more = {"connect_args": {"timeout": WAIT}} if url.startswith("sqlite") else {}
    try:
        with _one_at_a_time(url):
            made: BaseStorage = optuna.storages.RDBStorage(
                url, engine_kwargs=more, heartbeat_interval=BEAT, grace_period=GRACE
            )
    except Exception as error:
        # Drivers raise what they like; none of it says what to do.
        hint = "Is the server there, and its driver installed? For PostgreSQL: pip install 'secateur[postgres]'"
        raise UnsupportedError(
            f"the storage {url.split('@')[-1]} cannot be opened", why=str(error)[:300], hint=hint
        ) from error
    return made


@contextlib.contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    """Workers that come to an empty database at once would all make its tables, and all but one fail."""
    if not url.startswith("postgresql"):
        yield
        return
    sqlalchemy = import_module("sqlalchemy")
    engine = sqlalchemy.create_engine(url)
    try:
        # Outside of any transaction: the lock belongs to the connection and goes with it.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as line:
            line.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({LOCK})"))
            yield
            line.execute(sqlalchemy.text(f"SELECT pg_advisory_unlock({LOCK})"))
    finally:
        engine.dispose()


def url_of(storage: str | Path) -> str:
    """The storage as Optuna names it; PostgreSQL by psycopg, unless the URL names another driver.

    Example:
        >>> url_of("postgresql://me@host/study")
        'postgresql+psycopg://me@host/study'
    """
    url = str(storage) if "://" in str(storage) else f"sqlite:///{Path(storage).absolute()}"
    kind, _, rest = url.partition("://")
    # The driver that SQLAlchemy would take is an older one, which is not the one of our extra.
    return f"postgresql+psycopg://{rest}" if kind in ("postgresql", "postgres") else url


def sampler_of(name: Samplers, seed: int) -> BaseSampler:
    """What proposes recipes."""
    samplers = import_module("optuna").samplers
    if name == "tpe":
        made: BaseSampler = samplers.TPESampler(seed=seed, constant_liar=True)
        return made
    return cast(
        "BaseSampler", samplers.NSGAIISampler(seed=seed) if name == "nsga2" else samplers.RandomSampler(seed=seed)
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's own lines for every trial; as it was afterwards."""
    logging = import_module("optuna").logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
