"""Measure ours against a peer, interleaved in one process; as ratios, for times of a shared machine are not stable.

python tools/benchmark.py mean_ap views loader pooling store annotate relabel transport patchct heads explainers
python tools/benchmark.py pooling pairs=60 out=docs/performance/pooling.json
python tools/benchmark.py loader workers=2
python tools/benchmark.py train device=cuda
"""

import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from mlvision.benchmarks import BENCHMARKS, BenchmarkOptions
from mlvision.engine.precision import resolve_device
from mlvision.errors import InputError
from mlvision.files import check_out, write_json
from mlvision.options import describe_options, is_override, parse_options, print_help
from mlvision.runs.environment import describe_environment


def usage() -> str:
    listed = "\n".join(f"  {name:12}{(row.__doc__ or '').splitlines()[0]}" for name, row in BENCHMARKS.items())
    return (
        f"usage: python tools/benchmark.py NAME ... [key=value ...]\n\n{__doc__}\n{listed}\n\n"
        f"{describe_options(BenchmarkOptions)}"
    )


def main(argv: list[str]) -> None:
    names = [argument for argument in argv if not is_override(argument) and not argument.startswith("-")]
    print_help(argv, usage, needed=True)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise InputError(f"expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}")
    rest = [argument for argument in argv if argument not in names]
    options = parse_options(BenchmarkOptions, rest, prog="python tools/benchmark.py", description=__doc__)
    options = replace(options, device=str(resolve_device(options.device)))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out:
        check_out(options.out)
    environment = describe_environment(torch.device(options.device))
    print(
        f"{environment['machine']}, threads={environment['threads']}, load {os.getloadavg()[0]:.1f}; median of "
        f"{options.pairs} pairs (10th to 90th percentile)\n"
    )
    print("| what | against | times as fast | target | milliseconds | |\n| --- | --- | ---: | --- | ---: | --- |")
    rows = []
    for name in tqdm(names, disable=None):
        for row in BENCHMARKS[name](options):
            low, high = row.interval
            notes = [row.note] if row.note else []
            notes += [] if row.difference is None else [f"difference {row.difference:.1e}"]
            print(
                f"| {row.what} | {row.peer} | {row.ratio:.3g} ({low:.3g} to {high:.3g}) | {row.target} | "
                f"{row.ours_ms:.3g} / {row.peer_ms:.3g} | {'; '.join(notes)} |",
                flush=True,
            )
            rows.append(asdict(row))
    if options.out:
        write_json(Path(options.out), {"rows": rows, "environment": environment, "load": os.getloadavg()[0]})
