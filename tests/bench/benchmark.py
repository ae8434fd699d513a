"""How fast Mixtral is, beside the machine's own ceilings and beside other programs.

    python tests/bench/benchmark.py [run] [--size mid] [--vs transformers,llama.cpp]
    python tests/bench/benchmark.py [run] [--size mid] --old ANOTHER_CHECKOUT
    python tests/bench/benchmark.py load | long

Weights are random: the cost of a step depends on them only through the experts that its tokens
choose, and these are counted. Programs that are compared run in turn, A B B A, and are compared
round by round, because a machine's speed drifts; a round in which its ceilings moved by more than
half is left out. Figures are medians (least-greatest). A floor is the time in which the device
moves the bytes and does the operations that a case needs, at the rates measured around the round.
"""

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import loading
import peers
import torch
from ceilings import STEADY, Ceilings, describe
from checkout import import_old
from contenders import SIZES, Ours, draw_prompts, randomise, rebuild, weights_of
from floors import Case, Used, floor_of, used_by_chance
from measuring import figures, peak_of, ratios, seconds_of

from mixtral import Transformer

Contender = Ours | peers.Transformers | peers.LlamaCpp
TimedWork = Callable[[int], object]  # given the number of the round


@dataclass
class Result:
    """What was measured of a case. Lists have a value for each round that was not left out."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by contender
    first: dict[str, list[int]] = field(default_factory=dict)  # each row's first token
    generate: dict[str, float] = field(default_factory=dict)  # seconds of generate's own steps
    floors: list[float] = field(default_factory=list)  # seconds
    used: Used | None = None
    bytes: float = 0
    memory: float = 0  # GB that mixtral needs beyond the weights
    rounds: int = 0
    left_out: int = 0  # of these rounds


class Benchmark:
    """The commands, on one set of options; what is measured is saved as it comes."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.devices = [f"cuda:{i}" for i in range(options.num_gpus)] or ["cpu"]
        size = SIZES[options.size]
        self.args = replace(size, n_layers=options.layers or size.n_layers)
        self.ceilings: list[Ceilings] = []  # of the first device, and of the host if it takes part
        self.results: list[Result] = []
        self.loaded: list[loading.Loaded] = []
        self.failures: list[str] = []
        self.machine = describe(self.devices)

    def show(self, text: str) -> None:
        """Print a result and save all that there are, for what comes next may fail."""
        print(text, flush=True)
        if self.options.json:
            results = [asdict(result) for result in self.results]
            results += [asdict(loaded) for loaded in self.loaded]
            saved = {
                "machine": self.machine,
                "options": vars(self.options),
                "results": results,
                "failures": self.failures,
                "ceilings": {c.device: (c.rates, c.ops) for c in self.ceilings},
            }
            Path(self.options.json).write_text(json.dumps(saved, indent=1) + "\n")

    @contextlib.contextmanager
    def reported(self, *what: object) -> Iterator[None]:
        """Report an error of any kind in one line, and let the rest be measured."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever another program raises
            subject = " ".join(map(str, what))
            line = f"{subject} failed: {type(error).__name__}: {error}".splitlines()[0]
            self.failures.append(line)
            self.show(line)

    def build(self, rows: int, length: int, device: str | None = None) -> Transformer:
        """A random model: as the options want it, or in bf16 on one device."""
        args = replace(self.args, max_batch_size=rows, max_seq_len=length)
        if device:
            model = Transformer(args, [device])
        else:
            model = loading.empty_model(args, self.devices, self.options)
        torch.manual_seed(0)
        randomise(model)
        return model

    def run(self) -> None:
        """Decode and prefill, as shares of their floors and beside other programs."""
        options = self.options
        cases = cases_of(options)
        self.results = [Result(case) for case in cases]
        rows = max(case.rows for case in cases)
        length = max(case.length for case in cases) + options.steps + 1
        with torch.inference_mode():
            transformers_fit = self.run_together(rows, length)
            if "transformers" in options.vs and not transformers_fit:
                self.run_transformers_alone(rows, length)
        self.compare_first_tokens()
        print(*self.ceilings, sep="\n")

    def run_together(self, rows: int, length: int) -> bool:
        """Measure mixtral and its contenders in turn. False if transformers did not fit."""
        options = self.options
        model = self.build(rows, length)
        self.ceilings = [Ceilings(self.devices[0])]
        if options.cpu_layers:
            self.ceilings.append(Ceilings("cpu"))
        contenders: dict[str, Contender] = {"mixtral": Ours(model)}
        if options.old:
            with self.reported("old"):
                package = import_old(Path(options.old))
                how = {"cpu_layers": options.cpu_layers, "int8": options.int8}
                contenders["old"] = Ours(rebuild(package, model, **how), package)
        if "llama.cpp" in options.vs:
            with self.reported("llama.cpp"):
                contenders |= peers.llama_cpp(model, weights_of(model), options.int8)
        # While they are built, transformers' experts are there twice.
        need = (2.2 + options.int8) * 2 * sum(p.numel() for p in model.parameters())
        fits = self.devices == ["cpu"] or torch.cuda.mem_get_info()[0] > need
        if "transformers" in options.vs and fits:
            with self.reported("transformers"):
                contenders |= peers.transformers(model, weights_of(model))
        self.measure(contenders)
        return fits

    def run_transformers_alone(self, rows: int, length: int) -> None:
        print("transformers runs after mixtral, on other weights: they do not fit together")
        gc.collect()
        torch.cuda.empty_cache()
        with self.reported("transformers"):
            meta = self.build(rows, length, "meta")
            self.measure(peers.transformers(meta, meta.state_dict(), randomise))

    def long(self) -> None:
        """Prompts of 1024, 2048, ... tokens: time, and memory beyond the weights."""
        options = self.options
        options.batches = []
        options.contexts = []
        options.repeats = 1
        options.prompts = [2**i for i in range(10, options.longest.bit_length())]
        self.run()

    def load(self) -> None:
        """Loading each published layout from the page cache, beside cat."""
        model = self.build(1, 1, "cpu")
        for layout in self.options.layouts.split(","):
            with self.reported(layout):
                loaded = loading.time_layout(layout, model, self.options)
                self.loaded.append(loaded)
                self.show(str(loaded))

    def load_once(self) -> None:
        """What load starts as a fresh process: it prints the figures of one loading."""
        print(json.dumps(loading.load_once(self.devices, self.options)))

    def measure(self, contenders: Mapping[str, Contender]) -> None:
        """Add each contender's seconds, and mixtral's floors, to each result."""
        for result in self.results:
            works = {}
            for name, contender in contenders.items():
                with self.reported(name, *result.case):
                    works[name] = self.warm(result, name, contender)
            with self.reported(*result.case):
                if works:
                    self.measure_rounds(result, works)
                for name, contender in contenders.items():
                    if isinstance(contender, Ours) and result.case.kind == "decode":
                        self.measure_generate(result, name, contender)
                self.show(self.line(result))

    def warm(self, result: Result, name: str, contender: Contender) -> TimedWork:
        """Do a contender's work once, and return it."""
        case = result.case
        first = []
        prompts = draw_prompts(self.args, case.rows, case.length)
        peak = peak_of(lambda: first.append(contender.prefill(prompts)), self.devices[0]).peak
        result.first[name] = first[0].tolist()
        if case.kind == "prefill":
            if name == "mixtral":
                result.used = used_by_chance(self.args, case.length, len(self.devices))
                result.memory = peak
            # Each round has prompts of its own, for some programs remember the last one.
            return lambda turn: contender.prefill(
                draw_prompts(self.args, case.rows, case.length, seed=turn + 1)
            )
        work = partial(contender.decode, first[0], case.length, self.options.steps)
        given = work()
        if name == "mixtral":
            assert isinstance(contender, Ours)
            assert given is not None
            result.used = Used(*contender.experts(given, case.length))
        return lambda turn: work()

    def measure_rounds(self, result: Result, works: Mapping[str, TimedWork]) -> None:
        """Run the works in turn, until as many rounds are kept as the options want.

        A round in which a ceiling moved by more than half is left out and made up for, up to twice
        that many rounds in all.
        """
        for name in works:
            result.seconds[name] = []
        wanted = self.options.repeats
        kept = 0
        self.measure_ceilings()
        for turn in range(2 * wanted):
            if kept == wanted:
                break
            # Whoever runs first after the ceilings is slowed down by that, so the order alternates.
            order = list(works) if turn % 2 == 0 else list(reversed(works))
            seconds = {name: seconds_of(partial(works[name], turn)) for name in order}
            self.measure_ceilings()
            result.rounds += 1
            if not all(ceilings.was_steady() for ceilings in self.ceilings):
                result.left_out += 1
                continue
            kept += 1
            for name in works:
                result.seconds[name].append(seconds[name])
            if "mixtral" in works:
                result.floors.append(self.floor(result))

    def measure_ceilings(self) -> None:
        for ceilings in self.ceilings:
            ceilings.measure()

    def measure_generate(self, result: Result, name: str, contender: Ours) -> None:
        """Time generate itself once: decode leaves out sampling and the host's waits."""
        case = result.case
        prompts = draw_prompts(self.args, case.rows, case.length, seed=self.options.repeats + 1)
        result.generate[name] = contender.seconds_to_generate(prompts, self.options.steps)

    def floor(self, result: Result) -> float:
        """Mixtral's floor in seconds, at the better rates of the last two measurements."""
        options = self.options
        assert result.used
        floor = floor_of(
            result.case,
            self.args,
            result.used,
            options.steps,
            len(self.devices),
            options.cpu_layers,
            options.int8,
        )
        result.bytes = floor.bytes
        device = self.ceilings[0]
        host = self.ceilings[-1]
        return floor.seconds(max(device.bytes[-2:]), max(device.ops[-2:]), max(host.bytes[-2:]))

    def line(self, result: Result) -> str:
        """A case in one line: each contender's tokens per second, and how they compare."""
        case = result.case
        tokens = case.rows * (case.length if case.kind == "prefill" else self.options.steps)
        parts = []
        for name, seconds in result.seconds.items():
            if seconds:
                parts.append(self.part(result, name, seconds, tokens))
        if result.left_out:
            parts.append(
                f"{result.left_out} of {result.rounds} rounds left out, in which the machine's "
                f"ceilings moved by more than {STEADY:g}x"
            )
        return f"{case.kind} {case.rows} x {case.length}: {'; '.join(parts)}"

    def part(self, result: Result, name: str, seconds: list[float], tokens: int) -> str:
        """One contender's part of a line."""
        text = f"{name} {figures([tokens / each for each in seconds], ' tok/s')}"
        if name == "mixtral":
            text += f", {median(ratios(result.floors, seconds)):.2f} of the floor"
            sheet = self.ceilings[0].sheet
            if result.case.kind == "prefill":
                text += f", {result.memory:.2f} GB beyond the weights"
            elif sheet:
                text += f", {result.bytes / median(seconds) / sheet:.2f} of the data sheet"
        elif result.seconds.get("mixtral"):
            text += f", {figures(ratios(seconds, result.seconds['mixtral']), 'x')} mixtral's time"
        if name in result.generate:
            text += f", generate itself {tokens / result.generate[name]:.3g} tok/s (once)"
        return text

    def compare_first_tokens(self) -> None:
        """Say for how many prompts each other contender's first token is mixtral's."""
        same: dict[str, list[bool]] = {}
        for result in self.results:
            for name, tokens in result.first.items():
                if name != "mixtral" and "mixtral" in result.first:
                    equal = [a == b for a, b in zip(tokens, result.first["mixtral"])]
                    same.setdefault(name, []).extend(equal)
        for name, equal in same.items():
            print(f"{name}: {sum(equal)} of {len(equal)} first tokens are mixtral's")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All batches at the first context, one row at the others, and the prompts."""
    cases = []
    for length in options.contexts[:1]:
        for rows in options.batches:
            cases.append(Case("decode", rows, length))
    for length in options.contexts[1:]:
        cases.append(Case("decode", 1, length))
    for length in options.prompts:
        cases.append(Case("prefill", 1, length))
    if not cases:
        raise ValueError("there is nothing to measure: name batches and contexts, or prompts")
    return cases


def make_parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    commands = ("run", "load", "long", "load_once")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", nargs="?", default="run", choices=commands)
    add("--size", default="mid", choices=SIZES)
    add("--layers", type=int, help="only so many of the size's layers")
    add("--num-gpus", type=int, default=int(on_gpu), help="0 is the CPU")
    add("--int8", action="store_true", help="experts in 8 bits")
    add(
        "--cpu-layers",
        type=int,
        default=0,
        help="layers whose experts are in host memory",
    )
    add("--repeats", type=int, default=3, help="rounds of a case")
    add("--json", metavar="FILE", help="for all that is measured")
    add("--vs", default="", help="run beside transformers,llama.cpp")
    add("--old", metavar="FOLDER", help="run beside the package of this other checkout")
    add("--batches", type=numbers, default="1,2,4,8,16", help="rows of a decode")
    add("--contexts", type=numbers, default="128,1024,4096", help="before a decode")
    add("--prompts", type=numbers, default="64,512,2048", help="to prefill")
    add("--steps", type=int, default=64 if on_gpu else 16, help="of a decode")
    add("--layouts", default="A,B,C,D-sharded", help="to load")
    add("--folder", help="of load_once")
    add("--longest", type=int, default=32768, help="prompt of long")
    return parser


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    options = make_parser().parse_args()
    benchmark = Benchmark(options)
    if options.command != "load_once":
        benchmark.show(f"mixtral benchmark: {benchmark.machine}")
    getattr(benchmark, options.command)()
    sys.exit(bool(benchmark.failures))


if __name__ == "__main__":
    main()
