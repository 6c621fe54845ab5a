"""``torchlamp sweep``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchlamp.cli.common import Threads, app, check_threads, one_line_errors
from torchlamp.cli.signals import exit_code, word
from torchlamp.cli.verbosity import error_console

if TYPE_CHECKING:
    from torchlamp.sweep.config import SweepConfig

#: Exit code of a sweep with failed points: everything else was computed.
SOME_FAILED = 1
ENGINES = ("local", "ray")


@app.command()
@one_line_errors
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A sweep in YAML: see docs/sweep.md.")],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the results; a sweep that was stopped there goes on."),
    ],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move the results in DIR aside and start anew.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the points spread over a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Ray actors; one for each processor by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Compute at most so many points now.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count the points, and estimate the time if some are done.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Compute every point of a sweep: resumable, one line of JSON a point, nothing finished is ever lost."""
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r}: allowed are {' and '.join(ENGINES)}")
    for name, number in (("limit", limit), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: give 1 or more")
    if workers is not None and engine != "ray":
        raise ValueError(f"--workers {workers}: only --engine ray has workers")
    check_threads(threads)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"can't sweep into {str(output)!r}: it is a file, give a folder")

    from torchlamp.sweep.config import read_config

    plan = read_config(config)
    if dry_run:
        _print_plan(plan, output)
        return

    from torchlamp.cli.sweep_progress import duration, sweep_reporter
    from torchlamp.sweep.folder import open_folder
    from torchlamp.sweep.run import sweep as run_sweep

    console = error_console()
    with open_folder(output, fresh=fresh) as folder:
        try:
            with sweep_reporter(console) as progress:
                summary = run_sweep(
                    plan, folder, _engine(engine, plan, workers, threads), limit=limit, progress=progress
                )
        except KeyboardInterrupt:
            finished = sum(folder.done(point) for point in plan.points)
            print(
                f"torchlamp: {word()}; {finished} of {len(plan.points)} points are done, and the same command "
                "goes on from there",
                file=sys.stderr,
            )
            raise typer.Exit(exit_code()) from None
    print(
        f"{summary.total} points: {summary.done} computed in {duration(summary.seconds)}, {summary.skipped} had a "
        f"result, {summary.failed} failed, {summary.left} left; results in {output}"
    )
    if summary.failed:
        print(
            f"torchlamp: {summary.failed} points failed, the last one: {summary.last_error}", file=sys.stderr
        )
        raise typer.Exit(SOME_FAILED)


def _engine(name: str, plan: "SweepConfig", workers: int | None, threads: int | None) -> Any:
    if name == "ray":
        from torchlamp.sweep.ray_points import RayEngine

        return RayEngine(plan, workers, threads)
    from torchlamp.sweep.run import LocalEngine

    return LocalEngine(plan, threads)


def _print_plan(plan: "SweepConfig", output: Path) -> None:
    """Points of each grid, and a time where earlier results give one."""
    from torchlamp.cli.sweep_progress import duration
    from torchlamp.sweep.estimate import Estimate
    from torchlamp.sweep.folder import read_results

    records = read_results(output)
    done = {record["key"] for record in records if record["status"] == "done"}
    estimate = Estimate(records)

    def row(name: str, points: list[Any]) -> None:
        left = [point for point in points if point.key not in done]
        seconds = estimate.seconds(left)
        time = "" if seconds is None or not left else f", about {duration(seconds)}"
        print(f"{name:{width}}  {len(points):6} points, {len(left)} to compute{time}")

    width = max(len(name) for name in ("all", *(grid.name for grid in plan.grids)))
    for grid in plan.grids:
        row(grid.name, list(grid.points))
    row("all", plan.points)
    if not done:
        print("No results yet to estimate the time from: run a few points with --limit 5.")
