"""The options of a sweep. The sentence under a field is its help text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.errors import RunError
from actors.storage import local
from models.label_free import SCORES
from pipelines.options import AdaptOptions, read_options
from pipelines.recipes import recipe
from tune_spaces.space import Space, check_space, fitting, read_space, shipped

ORACLE = "miou"
"""The one metric that needs target labels."""
METRICS = (*SCORES, ORACLE)
LARGEST_GRID = 200
"""Points of a grid that nobody has asked for by number."""
CONFIG = "sweep.toml"
NEEDS_FOLDER = "a sweep keeps its trials and what Ray Tune goes on from in one folder of this machine"


@dataclass(frozen=True)
class SweepOptions(AdaptOptions):
    """Search the options of a recipe with Ray Tune; what all trials share is given as for a single run."""

    num_samples: int | None = None
    """Trials. Default: 20, and every point of a grid."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: TPE learns from the trials before. random: independent points. grid: every combination. All begin with
    the published values, then the recipe's defaults."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """Which trials end early. asha: all but the best third at every rung. median: those below the median of the others'
    running means. none: nobody, so that every trial can be compared with every other."""
    metric: str = "combined"
    """What ranks trials, higher is better: combined, source_miou, information, label_free, entropy, disagreement,
    agreement, consistency or stability need no target labels (docs/sweeps.md says what each is worth). miou does, and
    makes the sweep an oracle's. The first two hold source images out: a tenth, at most 64, unless --held-out says."""
    space: str | None = None
    """TOML file of a search space of your own. Default: the recipe's, in tune_spaces."""
    only: tuple[str, ...] = ()
    """Parameters of the space to search, for example eplc.dropout eplc.keep-share. Default: all."""
    max_concurrent: int | None = None
    """Trials at a time. Default: as many as the cluster holds with their teachers, evaluators and readers."""
    warm_start: Literal["auto", "never"] = "auto"
    """auto: the first stage of a recipe with several is trained once, and all trials start from its weights. never:
    each trains all stages."""
    keep: Literal["best", "all"] = "best"
    """Whose checkpoints stay on the disk: the best trial's so far, or all. Everything else of a trial stays."""
    looks: int = 5
    """How often in a trial its score is measured; a scheduler decides at these."""
    oracle: Literal["auto", "always", "never"] = "auto"
    """Also score the last step of a trial with target labels, for the record: what ranks trials is --metric alone.
    auto: on the miniature only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        local(self.runs, "--runs", NEEDS_FOLDER)
        object.__setattr__(self, "only", tuple(self.only))  # TOML has lists
        if self.references == "always":
            raise RunError("--references always: the trials of a sweep train no reference runs; leave it out")
        for name, fixed in (("max_teachers", "teachers"), ("min_students", "students")):
            if getattr(self, name) is not None:
                raise RunError(
                    f"--{name.replace('_', '-')}: what a trial needs is counted before it begins; leave it out, "
                    f"and give --{fixed}"
                )
        if self.metric not in METRICS:
            raise RunError(f"--metric is {self.metric!r}; choose one of {', '.join(METRICS)}")
        for name in ("num_samples", "max_concurrent", "looks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if self.oracle == "never" and self.metric == ORACLE:
            raise RunError("--metric miou ranks trials by target labels; leave --oracle never out, or choose another")
        if self.students > 1 and not self.dashboard:
            raise RunError(
                "with several --students a trial that ends early is cleared away by a part of Ray that asks its "
                "dashboard; leave --no-dashboard out"
            )

    def folder(self) -> Path:
        """The sweep's folder, absolute.

        Raises:
            RunError: the options name no sweep yet.
        """
        found = super().folder()
        assert isinstance(found, Path)
        return found

    @property
    def scores_target(self) -> bool:
        """Whether trials are scored with target labels."""
        asked = self.oracle == "always" or (self.oracle == "auto" and self.on_miniature)
        return asked or self.metric == ORACLE

    @property
    def shares_stage_one(self) -> bool:
        """Whether a first stage is to be trained for all trials; not where the user gives its weights."""
        several = recipe(self.recipe).schedules != 1
        return self.warm_start == "auto" and several and self.from_stage == 1 and self.to_stage != 1

    def run_options(self) -> AdaptOptions:
        """What a single run would be told."""
        return AdaptOptions(**{item.name: getattr(self, item.name) for item in dataclasses.fields(AdaptOptions)})

    def first_stage(self) -> AdaptOptions:
        """The run whose weights all trials start from. Refinement comes behind it, in every trial."""
        prior = dataclasses.replace(self.prior, refine_steps=0)
        own = dataclasses.replace(self.run_options(), to_stage=1, references="never", prior=prior)
        return dataclasses.replace(own, runs=str(self.folder()), name="stage-one")

    def trial_options(self) -> AdaptOptions:
        """What all trials have in common."""
        shared = dataclasses.replace(self.run_options(), references="never", runs=str(self.folder() / "trials"))
        if not self.shares_stage_one:
            return shared
        return dataclasses.replace(shared, init=str(self.folder() / "stage-one"), from_stage=2)

    def read_space(self, path: str | Path | None = None) -> tuple[Space, list[str]]:
        """The space to search, checked against the recipe, and what of the recipe's own space is left out, and why.

        Args:
            path: where a copy of it lies; None for the original.

        Raises:
            RunError: it cannot be read, or does not fit the recipe.
        """
        if path is None:
            path = shipped(self.recipe) if self.space is None else self.space
        space = read_space(path).only(self.only)
        left_out: list[str] = []
        if self.space is None and not self.only:
            space, left_out = fitting(space, self.trial_options())
        check_space(space, self.trial_options())
        return space, left_out

    def trials(self, space: Space) -> int:
        """How many trials there will be.

        Raises:
            RunError: a grid has more points than it may.
        """
        if self.search != "grid":
            return 20 if self.num_samples is None else self.num_samples
        most = LARGEST_GRID if self.num_samples is None else self.num_samples
        points = space.combinations()
        if points <= most:
            points = len(space.grid(self.trial_options()))  # with those that are always tried
        if points > most:
            sizes = ", ".join(f"{p.name} {len(p.grid())}" for p in space.parameters)
            raise RunError(
                f"this grid has {points} points ({sizes}), more than {most}: search fewer parameters (--only), give "
                f"them fewer values (--space), or ask for all of them with --num-samples {points}"
            )
        return points


def read_sweep_options(folder: str | Path) -> SweepOptions:
    """Options of a sweep that was started before.

    Raises:
        RunError: the folder is no sweep.
    """
    folder = local(str(folder), "--resume", NEEDS_FOLDER).absolute()
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is no sweep: it has no {CONFIG}. Give a folder that a sweep printed.")
    found = read_options(folder / CONFIG, SweepOptions)
    if found.folder() != folder:
        raise RunError(
            f"{folder} was moved from {found.folder()}, and its trials know that place only; move it back to resume it"
        )
    return found
