"""The command line. Heavy imports are made inside the commands, so that `fldist --help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Federated learning that really runs distributed, with every byte counted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Data sets: which there are, and making one ready.", no_args_is_help=True)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure what this version does on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Pairs = Annotated[int | None, typer.Option(help="Pairs of rounds, the two things compared in turn (default: 15).")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures into this file, too.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes and few repeats: does it work here?")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Federated learning that really runs distributed, with every byte counted."""
    if version:
        import fldist

        typer.echo(f"fldist {fldist.__version__}")
        raise typer.Exit


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks to run: this process as server and N-1 hosts.")] = 1,
    output: Annotated[Path | None, typer.Option(help="The run's directory: a new one, or an unfinished run's.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print configuration, rank map and predicted bytes; run nothing.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say of each client why its reply is missing.")
    ] = False,
) -> None:
    """Run a configuration: alone, with --nproc, or under torchrun or mpirun."""
    from fldist.config import load
    from fldist.console import Progress
    from fldist.runner import run_here

    settings = load(config, overrides or [])
    if dry_run:
        from fldist.inspection import dry_run as show

        typer.echo(show(settings, nproc))
        return
    run_here(settings, nproc=nproc, output=output, observer=Progress(verbose))


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="A run's directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="rounds=N, eval..., deadlines..., network...")] = None,
    nproc: Annotated[int, typer.Option(help="Ranks to run: this process as server and N-1 hosts.")] = 1,
    stage: Annotated[
        str | None, typer.Option("--from", help="Begin again with this stage, in a new directory (--output).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --from: the directory of the run that is begun.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say of each client why its reply is missing.")
    ] = False,
) -> None:
    """Go on with a run from its last round, on any number of ranks, with the same result; or extend one.

    With --from: begin another run from the end of a stage of this one, which is left as it is.
    """
    from fldist.console import Progress
    from fldist.runner import resume_here

    observer = Progress(verbose)
    resume_here(directory, overrides or [], stage=stage, nproc=nproc, output=output, observer=observer)


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A name such as fedavg or oort, or mypkg.mine:Thing, or mine.py:Thing.")],
) -> None:
    """What an algorithm or a selector is, its fields, and what its messages carry."""
    from fldist.inspection import describe as show

    typer.echo(show(name))


@app.command()
def partition(
    config: Annotated[str, typer.Argument(help="A YAML file, e.g. configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table into this file (.png, .pdf, .svg).")] = None,
) -> None:
    """Who holds what: training samples by client and class."""
    from fldist.config import load
    from fldist.inspection import partition as show
    from fldist.inspection import plot_partition

    text, task = show(load(config, overrides or []))
    typer.echo(text)
    if plot is not None:
        plot_partition(task, plot, text.partition("\n")[0])
        typer.echo(f"drawn in {plot}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories, directories that hold runs, or run.h5 files.")],
    baseline: Annotated[
        str | None, typer.Option(help="What to compare with: a method's label (default: fedavg, else the first).")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="A budget, such as rounds=20, uplink_bytes=5MB, joules=900; repeatable.")
    ] = None,
    to: Annotated[list[float] | None, typer.Option(help="An accuracy to reach, such as 0.8; repeatable.")] = None,
    last: Annotated[int, typer.Option(help="Final accuracy is each run's mean over so many last scored rounds.")] = 1,
    best: Annotated[bool, typer.Option("--best", help="Final accuracy is each run's best scored round.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the figures in full into this file, too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.png, .pdf, .svg).")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="What to draw accuracy against (default: total_bytes); repeatable: panels side by side."),
    ] = None,
    chosen: Annotated[bool, typer.Option("--chosen", help="Draw how often clients were chosen, too.")] = False,
) -> None:
    """Compare runs: at equal budgets, to an accuracy, in pairs of seeds against a baseline; a task at a time."""
    from fldist.analysis import plot as drawing
    from fldist.analysis import tables
    from fldist.analysis.compare import Final, axis_of, check_last, check_target, gather, parse_budget, require, split

    budgets = [parse_budget(text) for text in at or []]
    targets = sorted({check_target(target) for target in to or []})
    if best and last != 1:
        raise ValueError(f"--best: not together with --last {last}; leave one out")
    final = Final(check_last(last), best)
    axes = list(dict.fromkeys(axis_of(name, "--against") for name in against or ["total_bytes"]))
    for option, path in (("--csv", csv), ("--plot", plot)):
        if path is not None:
            tables.require_directory(option, path)
    if chosen and plot is None:
        raise ValueError("--chosen: it is drawn into the file that --plot names; name one")
    if plot is not None:
        drawing.require_ending(plot)
    usable, left_out = gather(runs)
    tasks = split(usable)
    for option, wanted in (("--at", [budget.axis for budget in budgets]), ("--against", axes)):
        for axis in wanted:
            require(tasks, axis, option)
    typer.echo(tables.text_of(tasks, baseline, budgets, targets, left_out, final))
    if csv is not None:
        tables.write_csv(csv, tasks, baseline, budgets, targets, final)
        typer.echo(f"figures in {csv}")
    if plot is not None:
        drawing.draw(tasks, plot, axes, chosen)
        typer.echo(f"drawn in {plot}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories, directories that hold runs, or run.h5 files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    check: Annotated[bool, typer.Option("--check", help="Only say whether each run's files agree.")] = False,
) -> None:
    """One HTML file about runs, which needs no network, and their timelines as Chrome traces beside it."""
    if check:
        from fldist.analysis.check import check as look
        from fldist.analysis.runs import find

        found = [look(path) for path in find(runs)]
        typer.echo("\n".join(of.text() for of in found))
        if any(of.failed for of in found):
            raise typer.Exit(1)
        return
    from fldist.analysis.report import write
    from fldist.units import bytes_text

    made = write(runs, output)
    for problem in made.unread:
        typer.echo(f"not read: {problem}", err=True)
    for path in made.traces:
        typer.echo(f"timeline for ui.perfetto.dev or chrome://tracing: {path}")
    count = "1 run" if made.num_runs == 1 else f"{made.num_runs} runs"
    typer.echo(f"report of {count}: {made.page} ({bytes_text(made.page.stat().st_size)})")


@app.command("pretrain-generator")
def pretrain_generator(
    data: Annotated[str, typer.Argument(help="A name from `fldist data list`, or your own data set.")],
    out: Annotated[Path, typer.Option(help="The weights: FILE.safetensors; FILE.json and FILE.png go beside.")],
    fields: Annotated[list[str] | None, typer.Argument(help="Other fields of task.data: key=value.")] = None,
    arch: Annotated[str, typer.Option(help="mini_style or mlp_vae.")] = "mini_style",
    images: Annotated[int | None, typer.Option(min=1, help="Train on the first so many images.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over them.")] = None,
    latent_dim: Annotated[int | None, typer.Option(min=1, help="Values of a latent.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and noise.")] = 0,
) -> None:
    """Train a small generator of images, for algorithm.generator, in minutes on a CPU."""
    import shlex

    from fldist.config import components, load
    from fldist.pretrain import pretrain

    given = {"arch": arch, "out": out, "images": images, "epochs": epochs, "latent-dim": latent_dim, "seed": seed}
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    command = shlex.join(["fldist", "pretrain-generator", data, *(fields or []), *options])
    settings = load({"task": {"data": {"name": data}}}, [f"task.data.{field}" for field in fields or []])
    pretrain(
        components(settings).load_data,
        arch,
        out,
        made_by={"made_by": command, "data": data},
        images=images,
        epochs=epochs,
        latent_dim=latent_dim,
        seed=seed,
        say=_aside,
    )


@app.command()
def doctor() -> None:
    """What works on this machine, what does not, and what to do about it."""
    from fldist.inspection import doctor as show

    text, healthy = show()
    typer.echo(text)
    if not healthy:
        raise typer.Exit(1)


@data_app.command("list")
def data_list() -> None:
    """Every named data set: what it is, where it is read from, whether it is there and cached."""
    from fldist.data.catalogue import overview

    typer.echo(overview())


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A name from `fldist data list`.")],
    fields: Annotated[list[str] | None, typer.Argument(help="Other fields of task.data: key=value.")] = None,
    root: Annotated[str | None, typer.Option(help="The folder to read from or download to.")] = None,
    path: Annotated[str | None, typer.Option(help="The file or folder, for images, hdf5, roles and leaf.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width to bring images to.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 or 3, for images.")] = None,
) -> None:
    """Download a data set if it is missing, and decode it into the cache that every run reads."""
    from fldist import resolve
    from fldist.config import load
    from fldist.data import catalogue, datasets

    if name not in datasets.NAMES:
        raise resolve.unknown("name", name, list(datasets.NAMES))
    options = {"root": root, "path": path, "size": size, "channels": channels}
    given = {key: value for key, value in options.items() if value is not None}
    # refuses what a run would refuse, in the same words
    section = load({"task": {"data": {"name": name, **given}}}, [f"task.data.{field}" for field in fields or []]).task
    typer.echo(catalogue.prepare(resolve.from_table(datasets.NAMES, name, "name")(**section.data.fields)))


@data_app.command("convert-generator")
def data_convert_generator(
    network: Annotated[Path, typer.Argument(metavar="NETWORK.pkl", help="A network pickle of StyleGAN3 or -XL.")],
    code_dir: Annotated[Path, typer.Option(help="A checkout of its code: the folder of dnnlib and torch_utils.")],
    out: Annotated[Path, typer.Option(help="The file to write, FILE.pt; FILE.json is written beside it.")],
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="The pickle may run any code here.")] = False,
    kind: Annotated[str, typer.Option(help="stylegan3 or stylegan-xl: the range of its pixels.")] = "stylegan3",
    key: Annotated[str, typer.Option(help="Which of the pickle's networks.")] = "G_ema",
    truncation_psi: Annotated[float, typer.Option(min=0, max=1, help="Pulls drawn latents to their mean.")] = 1.0,
) -> None:
    """Turn a StyleGAN network pickle, once, into a TorchScript file that needs no trust: generator torchscript."""
    from fldist.models.generators.convert import convert
    from fldist.models.generators.stylegan import StyleGan

    if kind not in ("stylegan3", "stylegan-xl"):
        raise ValueError(f"--kind: it must be stylegan3 or stylegan-xl; got {kind!r}")
    config = StyleGan(
        network_pkl=str(network),
        code_dir=str(code_dir),
        kind="stylegan3" if kind == "stylegan3" else "stylegan-xl",
        key=key,
        truncation_psi=truncation_psi,
        trust_pickle=trust_pickle,
    )
    typer.echo(convert(config, out))


@bench_app.command("exchange")
def bench_exchange(
    pairs: Pairs = None,
    backend: Annotated[str, typer.Option(help="all, gloo or mpi.")] = "all",
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """A ResNet-18 to three hosts and back against a bare loop and plain TCP; the server's memory in FedAvg."""
    from fldist.bench import exchange, measure

    typer.echo(measure.told(lambda: exchange.measure(pairs, backend=backend, quick=quick, say=_aside), json_file))


@bench_app.command("round")
def bench_round(
    repeats: Annotated[int | None, typer.Option(help="Runs of 50 rounds each (default: 3).")] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """What a round costs in which next to nothing travels: one number each way, 100 clients on two hosts."""
    from fldist.bench import measure
    from fldist.bench import round as of_round

    typer.echo(measure.told(lambda: of_round.measure(repeats, quick=quick, say=_aside), json_file))


@bench_app.command("workload")
def bench_workload(pairs: Pairs = None, json_file: Json = None, quick: Quick = False) -> None:
    """FedAvg on MNIST with LeNet-5: one process against two hosts, and against a bare training loop."""
    from fldist.bench import measure, workload

    typer.echo(measure.told(lambda: workload.measure(pairs, quick=quick, say=_aside), json_file))


@bench_app.command("autoflip")
def bench_autoflip(
    repeats: Annotated[int | None, typer.Option(help="Turns of all that is compared (default: 9).")] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """What a mask costs a step of local training, and what taking units out saves: TwoCNN and an MLP."""
    from fldist.bench import autoflip, measure

    typer.echo(measure.told(lambda: autoflip.measure(repeats, quick=quick, say=_aside), json_file))


@bench_app.command("fedzge")
def bench_fedzge(
    repeats: Annotated[int | None, typer.Option(help="Turns of all that is compared (default: 7).")] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """What FedZGE's queries cost when a key stands for the directions, against images sent one by one."""
    from fldist.bench import fedzge, measure

    typer.echo(measure.told(lambda: fedzge.measure(repeats, quick=quick, say=_aside), json_file))


@bench_app.command("fedktl")
def bench_fedktl(
    repeats: Annotated[int | None, typer.Option(help="Turns of all that is compared (default: 7).")] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """FedKTL's alignment against the same one batch by batch with a data loader; prototypes; the transfer term."""
    from fldist.bench import fedktl, measure

    typer.echo(measure.told(lambda: fedktl.measure(repeats, quick=quick, say=_aside), json_file))


@bench_app.command("fedf2dg")
def bench_fedf2dg(
    repeats: Annotated[int | None, typer.Option(help="Turns of all that is compared (default: 7).")] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """FedF2DG's model inversion against the plain loop, in one process and on two hosts; its distillation."""
    from fldist.bench import fedf2dg, measure

    typer.echo(measure.told(lambda: fedf2dg.measure(repeats, quick=quick, say=_aside), json_file))


@bench_app.command("fedgcs")
def bench_fedgcs(
    repeats: Annotated[int | None, typer.Option(help="Turns of both selections (default: 10).")] = None,
    instances: Annotated[
        int | None, typer.Option(help="Sets of utilities, of each score, for which both choose (default: 1).")
    ] = None,
    json_file: Json = None,
    quick: Quick = False,
) -> None:
    """FedGCS's selection against its published formulation: time, and the true score of the chosen set."""
    from fldist.bench import fedgcs, measure

    typer.echo(measure.told(lambda: fedgcs.measure(repeats, instances, quick=quick, say=_aside), json_file))


@bench_app.command("suite")
def bench_suite(
    suite: Annotated[Path, typer.Argument(help="A suite, e.g. configs/bench/family.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value for every run; seeds=[0,1], jobs=N, nproc=N.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the runs are written (default: runs/NAME).")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time (default: usable cores / nproc).")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Say what would be run; run nothing.")] = False,
) -> None:
    """Run methods x seeds; what is finished is not run again, what is not goes on, a failure stops no other."""
    from fldist.bench import suite as of_suite
    from fldist.bench.shown import shown_here

    given = of_suite.read(suite, overrides or [])
    directory = output or Path("runs") / given.name
    runs = of_suite.plan(given, directory, overrides or [])
    if list_only:
        for run in runs:
            of_suite.settle(run)
            typer.echo(f"{run.name}  {run.rounds}/{run.of} rounds  {run.state}")
        return
    try:
        of_suite.execute(given, runs, shown_here(), jobs)
    finally:
        for line in of_suite.lines_of(runs):
            typer.echo(line, err=True)
    typer.echo(f"results in {directory}; fldist compare {directory}; fldist report {directory} -o report.html")
    if any(run.state != "finished" for run in runs):
        raise typer.Exit(1)


def _aside(text: str) -> None:
    """Tell how far a measurement is, apart from what it finds."""
    typer.echo(text, err=True)


def main() -> None:
    """Entry point: errors that a user can act on are one line, not a traceback."""
    if sys.argv[1:] == ["_host"]:
        _main_host()
        return
    if sys.argv[1:2] == ["_spawned"]:
        _main_spawned(sys.argv[2:])
        return
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        sys.exit(_code_of(error))
    except BaseException as error:
        number = getattr(error, "signal_number", None)
        if number is None:
            raise
        if not getattr(error, "told", False):
            print(f"fldist: {error}", file=sys.stderr)
        sys.exit(128 + number)
    sys.exit(code if isinstance(code, int) else 0)  # what typer.Exit was given, or a command's None


def _code_of(error: Exception) -> int:
    """Print an error as it deserves; returns the exit code."""
    if isinstance(error, typer.BadParameter.__mro__[2]):  # ClickException, wherever typer keeps it
        error.show()  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    from fldist.runtime.caller import ClientCodeFailed
    from fldist.runtime.membership import RunStopped
    from fldist.wire.errors import TransportError

    if isinstance(error, ValueError) and _is_ours(error):
        print(f"fldist: {error}", file=sys.stderr)
        return 2
    if isinstance(error, RunStopped):  # the run has said so itself
        return 1
    if isinstance(error, TransportError | ClientCodeFailed):
        print(f"fldist: {error}", file=sys.stderr)
        return 1
    raise error


def _is_ours(error: ValueError) -> bool:
    """Whether this package raised it (a user's mistake), or some library did (a fault: show the traceback)."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__", "")).startswith("fldist")


def _main_host() -> None:
    from fldist.runner import child_host
    from fldist.wire.errors import TransportError

    try:
        child_host()
    except TransportError as error:
        print(f"fldist host: {error}", file=sys.stderr)
        sys.exit(1)


def _main_spawned(arguments: list[str]) -> None:
    """A process that the server of an MPI run has spawned: rank and limit on joining, in seconds, are its arguments.

    MPI comes first: until this process has called MPI_Init the server's spawn waits, and if it ended before, for ever.
    """
    import signal

    if len(arguments) != 2:
        sys.exit("fldist: `fldist _spawned` is started by the server of an MPI run, not by hand")
    rank, join_s = int(arguments[0]), float(arguments[1])
    signal.setitimer(signal.ITIMER_REAL, join_s)  # kills it, whatever it hangs in
    from fldist.wire.ulfm import prepare

    prepare()
    from mpi4py import MPI

    parent = MPI.Comm.Get_parent()
    if parent == MPI.COMM_NULL:
        sys.exit("fldist: `fldist _spawned` is started by the server of an MPI run, not by hand")
    from fldist.runner import spawned_host

    signal.setitimer(signal.ITIMER_REAL, 0)
    spawned_host(parent, rank, join_s)
