"""The command that plans: what a recipe will take in memory, time and communication."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gibbsian.commands.console import console_of
from gibbsian.errors import DataError, InputError, ModelFileError, OptionError
from gibbsian.options import DataOptions, plain_option

if TYPE_CHECKING:
    from torch import Tensor

    from gibbsian.recipes import Recipe

_FLAG = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Where and how large the run is to be."""

    ranks: int = 1
    """Processes."""
    chains: plain_option(int, "Chains to draw with, of all processes together.", "(none: training alone)") = None  # type: ignore
    dim: plain_option(int, "Columns of a row, where no data say it.", "(the data's)") = None  # type: ignore
    rows: plain_option(int, "Rows of training data.", "(the data's)") = None  # type: ignore
    training: bool = True
    """Plan training."""
    streamed: Annotated[bool, _FLAG] = False
    """The data are read as they are needed, instead of lying in memory."""
    bandwidth: plain_option(
        float, "GB/s one way between processes; NVLink 4 has 450.", "(measured among local processes)"
    ) = None  # type: ignore
    latency: plain_option(float, "Microseconds of a message between processes.", "(measured, or 10)") = None  # type: ignore
    per_node: int = 8
    """Processes of a node, where nodes have links of their own."""
    node_bandwidth: plain_option(
        float, "GB/s one way between nodes, for each process; InfiniBand NDR has 50.", "(all in one node)"
    ) = None  # type: ignore
    node_latency: plain_option(float, "Microseconds of a message between nodes.", "(10)") = None  # type: ignore
    teraflops: plain_option(
        float, "What a processor of another kind sustains in products, in TFLOP/s.", "(this one, measured)"
    ) = None  # type: ignore
    launch: plain_option(float, "Microseconds that such a processor needs for each call of a kernel.", "(5)") = None  # type: ignore
    overlap: Annotated[bool, _FLAG] = False
    """Gradients are sent while the backward pass goes on, as GPUs do."""
    seconds: float = 12.0
    """Time for measuring, the start of processes aside."""
    threads: plain_option(int, "Threads of each process.", "(torch's)") = None  # type: ignore
    json: Annotated[Path | None, tyro.conf.arg(help="Where to write all numbers.", metavar="FILE")] = None
    seed: int = 0
    """Of the weights."""


def plan_command(overrides: type) -> Callable[..., None]:
    """Build the command with the options that a recipe has.

    Parameters
    ----------
    overrides
        The dataclass of those.
    """
    recipe_help = "A run's folder or its recipe.json, or data as for gibbsian train; flags alone say it with --dim."
    options = dataclasses.make_dataclass(
        "PlanWords",
        [
            (
                "recipe",
                Annotated[
                    str,
                    tyro.conf.Positional,
                    tyro.conf.arg(help=recipe_help, metavar="[RECIPE]", help_behavior_hint=""),
                ],
                "",
            ),
            ("where", PlanOptions, dataclasses.field(default_factory=PlanOptions)),
            ("reading", DataOptions, dataclasses.field(default_factory=DataOptions)),
            ("overrides", overrides, dataclasses.field(default_factory=overrides)),
        ],
    )

    def run(options: Any) -> None:
        plan(options)

    run.__annotations__ = {"options": Annotated[options, tyro.conf.arg(name="")], "return": None}
    run.__doc__ = plan.__doc__
    return run


def plan(options: Any) -> None:
    """Predict memory, time per step and communication of a recipe, from what this machine takes for it now."""
    import torch

    from gibbsian.planning import Question
    from gibbsian.planning.counts import resident
    from gibbsian.planning.planned import plan as planned
    from gibbsian.planning.tables import renderables
    from gibbsian.runs import write_file

    program = resident()
    where: PlanOptions = options.where
    if where.threads is not None:
        if where.threads < 1:
            raise OptionError(f"threads counts those of each process, 1 or more; got {where.threads}.")
        torch.set_num_threads(where.threads)
    if where.json is not None and where.json.is_dir():
        raise OptionError(f"--json {where.json} is a folder; name a file.")
    recipe, data, rows = asked(options)
    link, outer = _links(where)
    # A recipe of one lane leaves it to the processes to have one each.
    lanes = getattr(recipe.training, "lanes", 1)
    question = Question(
        recipe,
        where.ranks,
        where.chains,
        None if lanes == 1 else lanes,
        rows,
        where.streamed,
        getattr(recipe.training, "sharding", "none") == "full",
        link,
        outer,
        where.per_node,
        _device(where),
        where.overlap,
        where.training,
    )
    console = console_of()
    console.print(
        f"{recipe.energy} energy of rows {tuple(recipe.shape)} by {recipe.objective}: measuring for about "
        f"{where.seconds:g} s",
        markup=False,
    )
    with console.status("measuring"):
        found = planned(question, where.seconds, data, program)
    for part in renderables(found):
        console.print(part, soft_wrap=isinstance(part, str))
    if where.json is not None:
        write_file(where.json, (json.dumps(found.to_dict(), indent=1) + "\n").encode())
        console.print(f"All numbers: {where.json}", markup=False, soft_wrap=True)


def asked(options: Any) -> tuple[Recipe, Tensor | None, int | None]:
    """Find out which recipe is meant, and the rows in model units where there are data.

    Raises
    ------
    InputError
        If the words name neither a run nor data, or do not fit together.
    """
    from gibbsian.recipes import choose

    where: PlanOptions = options.where
    given = {k: v for k, v in dataclasses.asdict(options.overrides).items() if v is not None}
    if where.dim is not None and where.dim < 1:
        raise OptionError(f"dim counts the columns of a row, 1 or more; got {where.dim}.")
    if not options.recipe:
        if where.dim is None:
            raise OptionError("Name a run's folder or data, or say how many columns rows have: --dim INT.")
        kind = options.reading.kind or ("binary" if given.get("energy") == "rbm" else "table")
        rows = 10_000 if where.rows is None else where.rows
        return choose(kind, (where.dim,), rows, given | {"seed": where.seed}), None, rows
    saved = saved_recipe(options.recipe)
    if saved is not None:
        return _changed(saved, given, where.dim), None, where.rows
    return _of_data(options, given)


def saved_recipe(words: str) -> Recipe | None:
    """Read the recipe of a run's folder or file; ``None`` where the words can only mean data.

    Raises
    ------
    ModelFileError
        If a file of that name holds no recipe.
    """
    from gibbsian.recipes import Recipe

    path = Path(words).expanduser()
    file = path / "recipe.json" if path.is_dir() else path
    if file.suffix != ".json":
        return None
    if path.is_dir() and not file.exists():
        return None  # a folder of images, perhaps
    try:
        saved = json.loads(file.read_text())
        return Recipe.from_dict(saved.get("recipe", saved))
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            f"{file} cannot be read as a recipe ({error}). A run's folder, as gibbsian train leaves it, holds one."
        ) from error


def _changed(recipe: Recipe, given: dict[str, Any], dim: int | None) -> Recipe:
    """Override fields of a saved recipe."""
    settings = {f.name for f in dataclasses.fields(recipe.training)}
    training = dataclasses.replace(recipe.training, **{k: v for k, v in given.items() if k in settings})
    changes = {k: v for k, v in given.items() if k not in settings}
    if dim is not None and (dim,) != recipe.shape:
        if len(recipe.shape) != 1:
            raise OptionError(f"--dim {dim} is for rows of columns; those of this recipe have shape {recipe.shape}.")
        changes["shape"] = (dim,)
    return dataclasses.replace(recipe, training=training, **changes)


def _of_data(options: Any, given: dict[str, Any]) -> tuple[Recipe, Tensor, int]:
    from gibbsian.data.binarise import HALF, binarised
    from gibbsian.recipes import choose
    from gibbsian.runs import load_data

    where: PlanOptions = options.where
    try:
        dataset = load_data(options.recipe, options.reading)
    except InputError as error:
        if not Path(options.recipe).expanduser().is_dir():
            raise
        raise DataError(f"{options.recipe} is no run's folder, as it has no recipe.json; as data: {error}") from error
    bits = given.get("energy") == "rbm" and given.get("visible") in (None, "bernoulli")
    if dataset.kind == "image" and bits:
        dataset = binarised(dataset, HALF)
    rows = len(dataset.train) if where.rows is None else where.rows
    overrides = given | {"seed": where.seed}
    recipe = choose(dataset.kind, dataset.event_shape, rows, overrides, dataset.label_names)
    if where.dim is not None and (where.dim,) != recipe.shape:
        raise OptionError(
            f"--dim {where.dim} contradicts the data, whose rows have shape {recipe.shape}; leave one out."
        )
    return recipe, dataset.scaling().forward(dataset.train), rows


def _links(where: PlanOptions) -> tuple[Any, Any]:
    from gibbsian.planning import Link

    if where.bandwidth is None and where.latency is not None:
        raise OptionError(f"--latency {where.latency:g} is that of a link whose bandwidth is stated: add --bandwidth.")
    if where.node_bandwidth is None and where.node_latency is not None:
        raise OptionError(f"--node-latency {where.node_latency:g} asks for --node-bandwidth, too.")
    made = [
        None if speed is None else Link.of(speed, 10.0 if delay is None else delay)
        for speed, delay in ((where.bandwidth, where.latency), (where.node_bandwidth, where.node_latency))
    ]
    if made[1] is not None and made[0] is None:
        raise OptionError("--node-bandwidth is that of several nodes: say also how fast one is inside, --bandwidth.")
    return made[0], made[1]


def _device(where: PlanOptions) -> Any:
    from gibbsian.planning import Device

    if where.teraflops is None:
        if where.launch is not None:
            raise OptionError(f"--launch {where.launch:g} is that of a processor that is stated: add --teraflops.")
        return None
    launch = 5.0 if where.launch is None else where.launch
    if not where.teraflops > 0.0 or launch < 0.0:
        raise OptionError(
            f"A processor sustains a positive number of TFLOP/s and needs 0 us or more for a call; got "
            f"{where.teraflops:g} and {launch:g}."
        )
    return Device(where.teraflops * 1e12, launch * 1e-6)
