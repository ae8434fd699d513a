"""How fast Mixtral is, beside the machine's own ceilings and beside other programs.

    python tests/bench/benchmark.py [run] [--size mid] [--vs transformers,llama.cpp]
    python tests/bench/benchmark.py load | long

Weights are random: the cost of a step depends on them only through the experts that its
tokens choose, and these are counted. Programs that are compared run in turn, A B A B,
and are compared pair by pair, because a machine's speed drifts. Figures are medians
(least-greatest). A floor is the time in which the device moves the bytes and does the
operations that a case needs, at the rates measured in the same round.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # it runs without the package being installed

import peers  # noqa: E402

from mixtral import Mixtral, ModelArgs, Transformer  # noqa: E402
from mixtral.checkpoint import load_checkpoint, read_params  # noqa: E402
from mixtral.model import Span  # noqa: E402

SIZES = {
    "demo": ModelArgs(160, 4, 32, 240, 6, 2, vocab_size=2048),
    "mid": ModelArgs(1024, 8, 128, 3584, 8, 2, vocab_size=32000),
    "8x7b": ModelArgs(),
}
# GB/s of a card's memory according to its data sheet.
SHEETS = {"NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350}
SHEETS |= {"NVIDIA A100-SXM4-80GB": 2040, "NVIDIA A100-SXM4-40GB": 1560}
Work = Callable[[], object]
Contender = "Ours | peers.Transformers | peers.LlamaCpp"


def figures(values: Sequence[float], unit: str = "") -> str:
    three = median(values), min(values), max(values)
    middle, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in three)
    return f"{middle}{unit} ({low}-{high})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def describe(devices: Sequence[str]) -> str:
    """The machine, what runs on it, and how busy it is already."""
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    with contextlib.suppress(OSError, IndexError):
        name += Path("/proc/cpuinfo").read_text().split("model name\t")[1].split("\n")[0]
    if devices != ["cpu"]:
        name = f"{len(devices)} x {torch.cuda.get_device_name(0)}, {name}"
    for package in ("torch", "transformers", "llama_cpp_python"):
        with contextlib.suppress(PackageNotFoundError):
            name += f", {package} {version(package)}"
    return f"{name}, load {os.getloadavg()[0]:.1f}"


def wait() -> None:
    for device in range(torch.cuda.device_count() * torch.cuda.is_initialized()):
        torch.cuda.synchronize(device)


def seconds_of(work: Work) -> float:
    """Wall time until the devices are done too, which is how long a user waits."""
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def peak_of(work: Work, device: str) -> tuple[float, float, float]:
    """Seconds, and by how many GB memory grew at most and in the end.

    On the host this is memory which no file backs: mapped weights are not counted.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)

    def used() -> float:
        if device != "cpu":
            return torch.cuda.max_memory_allocated(device) / 1e9
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(used())

    samples, done, thread = [used()], threading.Event(), threading.Thread(target=watch)
    thread.start()
    seconds = seconds_of(work)
    done.set()
    thread.join()
    samples.append(used())
    return seconds, max(samples) - samples[0], samples[-1] - samples[0]


class Ceilings:
    """A device's bytes and bf16 operations per second, measured in every round."""

    def __init__(self, device: str):
        self.device, self.n = device, 2048 if device == "cpu" else 8192
        self.a, self.b = torch.randn(2, self.n, self.n, device=device).bfloat16()
        # 1 GiB, which no cache holds; read as float32, too, it is all finite numbers.
        buffer = torch.rand(2**20, device=device).bfloat16().repeat(2**9)
        floats, self.size, self.sheet = buffer.view(torch.float32), buffer.nbytes, None
        longs = buffer.view(torch.int64)
        self.methods = {"int64 sum": longs.sum, "float32 sum": floats.sum}
        self.methods["float32 max"] = floats.amax
        if device == "cpu":
            self.methods["float32 dot"] = lambda: floats.dot(floats)
        else:
            target, card = torch.empty_like(buffer), torch.cuda.get_device_name(device)
            self.methods["copy"] = lambda: target.copy_(buffer)
            self.sheet = next((1e9 * v for k, v in SHEETS.items() if k in card), None)
        self.rates: dict[str, list[float]] = {name: [] for name in self.methods}
        self.bytes: list[float] = []
        self.ops: list[float] = []

    def seconds(self, work: Work) -> float:
        """The best of three; on a GPU the mean of 50 repeats between two events."""
        if self.device == "cpu":
            return min(seconds_of(work) for _ in range(3))
        work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(50):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / 50

    def measure(self) -> None:
        for name, work in self.methods.items():
            moved = self.size * (2 if name == "copy" else 1)
            self.rates[name].append(moved / self.seconds(work))
        self.bytes.append(max(rates[-1] for rates in self.rates.values()))
        self.ops.append(2 * self.n**3 / self.seconds(lambda: self.a @ self.b))

    def __str__(self) -> str:
        gflops = figures([x / 1e9 for x in self.ops], " GFLOP/s")
        text = f"ceilings of {self.device}: bf16 products {gflops}"
        for name, rates in self.rates.items():
            text += f", {name} {figures([x / 1e9 for x in rates], ' GB/s')}"
            if self.sheet:
                text += f" = {median(rates) / self.sheet:.2f} of the data sheet"
        return text


@torch.inference_mode()
def randomise(model: nn.Module) -> None:
    """Weights that keep activations, and the gates' logits, at about unit size."""
    for name, p in model.named_parameters():
        if p.dtype == torch.int8:
            p.random_(-127, 128)
        else:
            p.normal_(std=1.0 if "embed" in name else p.shape[-1] ** -0.5)
        if p.dim() == 1:
            p.add_(1)
    for name, scale in model.named_buffers():
        if name.endswith(".scale"):  # uniform integers deviate by 127 / sqrt(3)
            weight = model.get_parameter(name.removesuffix("scale") + "weight")
            scale.fill_(3**0.5 / 127 * weight.shape[-1] ** -0.5)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """The state dict in bf16: 8-bit weights are multiplied by their scales."""
    state, scales = model.state_dict(), dict(model.named_buffers())
    for name, weight in state.items():
        if weight.dtype == torch.int8:
            scale = scales[name.removesuffix("weight") + "scale"].view(-1, 1)
            state[name] = (weight * scale).bfloat16()
    return {name: x for name, x in state.items() if not name.endswith(".scale")}


def draw_prompts(args: ModelArgs, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randint(3, args.vocab_size, (rows, length), generator=generator)
    return drawn.tolist()


class Ours:
    """Mixtral through its public methods."""

    def __init__(self, model: Transformer):
        self.model, self.args = model, model.params
        no_end = SimpleNamespace(eos_id=-1)  # every row runs to max_gen_len
        self.generate = Mixtral(model, no_end).generate

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        return torch.tensor(self.generate(prompts, 1, 0)[0]).flatten()

    def decode(self, tokens: Tensor, start: int, steps: int) -> Tensor:
        """The tokens given to each step, (steps, batch), the first of them tokens."""
        given, tokens = [], tokens.to(self.model.device)
        for i in range(start, start + steps):
            given.append(tokens)
            spans = [Span(row, i, 1) for row in range(len(tokens))]
            tokens = self.model.forward_packed(tokens, spans).argmax(-1)
        return torch.stack(given)

    def experts(self, given: Tensor, start: int) -> tuple[float, float]:
        """How many experts of a layer a step used: in all, and on the device with most.

        The steps are taken again as one forward, in which hooks on the gates run.
        """
        chosen, (steps, rows), n = [], given.shape, self.args.num_experts

        def hook(_: nn.Module, inputs: tuple, logits: Tensor) -> None:
            selected = logits.topk(self.args.num_experts_per_tok).indices
            used = F.one_hot(selected, n).sum(1).view(rows, steps, -1).any(0)
            chosen.append(used.view(steps, len(self.model.devices), -1).sum(2).float())

        gates = [layer.feed_forward.gate for layer in self.model.layers]
        hooks = [gate.register_forward_hook(hook) for gate in gates]
        spans = [Span(row, start, steps) for row in range(rows)]
        self.model.forward_packed(given.T.flatten(), spans, last_only=True)
        for handle in hooks:
            handle.remove()
        used = torch.cat(chosen)  # (layers * steps, devices)
        return used.sum(1).mean().item(), used.amax(1).mean().item()


class Benchmark:
    """The commands, on one set of options; what is measured is saved as it comes."""

    def __init__(self, options: argparse.Namespace):
        self.options, size = options, SIZES[options.size]
        self.devices = [f"cuda:{i}" for i in range(options.num_gpus)] or ["cpu"]
        self.args = replace(size, n_layers=options.layers or size.n_layers)
        self.ceilings: list[Ceilings] = []
        self.results: list[dict] = []
        self.failures: list[str] = []
        self.machine = describe(self.devices)

    def show(self, text: str) -> None:
        """Print a result and save all that there are, for what comes next may fail."""
        print(text, flush=True)
        if self.options.json:
            saved = {"machine": self.machine, "options": vars(self.options)}
            saved |= {"results": self.results, "failures": self.failures}
            saved["ceilings"] = {c.device: (c.rates, c.ops) for c in self.ceilings}
            Path(self.options.json).write_text(json.dumps(saved, indent=1) + "\n")

    @contextlib.contextmanager
    def reported(self, *what: object) -> Iterator[None]:
        """Report an error of any kind in one line, and let the rest be measured."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            what = " ".join(map(str, what))
            line = f"{what} failed: {type(error).__name__}: {error}".splitlines()[0]
            self.failures.append(line)
            self.show(line)

    def empty(self, args: ModelArgs) -> Transformer:
        o = self.options
        return Transformer(args, self.devices, cpu_layers=o.cpu_layers, int8=o.int8)

    def build(self, rows: int, length: int, device: str | None = None) -> Transformer:
        """A random model: as the options want it, or in bf16 on one device."""
        args = replace(self.args, max_batch_size=rows, max_seq_len=length)
        model = Transformer(args, [device]) if device else self.empty(args)
        torch.manual_seed(0)
        randomise(model)
        return model

    @torch.inference_mode()
    def run(self) -> None:
        """Decode and prefill, as shares of their floors and beside other programs."""
        o = self.options
        cases = [("decode", n, length) for length in o.contexts[:1] for n in o.batches]
        cases += [("decode", 1, length) for length in o.contexts[1:]]
        cases += [("prefill", 1, length) for length in o.prompts]
        self.results = [{"case": case, "seconds": {}, "first": {}} for case in cases]
        room = max([1, *o.batches]), max([*o.prompts, *o.contexts]) + o.steps
        model = self.build(*room)
        self.ceilings = [Ceilings(self.devices[0])]
        if o.cpu_layers:
            self.ceilings.append(Ceilings("cpu"))
        contenders: dict[str, Contender] = {"mixtral": Ours(model)}
        if "llama.cpp" in o.vs:
            with self.reported("llama.cpp"):
                contenders |= peers.llama_cpp(model, weights_of(model), o.int8)
        # While they are built, transformers' experts are there twice.
        need = (2.2 + o.int8) * 2 * sum(p.numel() for p in model.parameters())
        fits = self.devices == ["cpu"] or torch.cuda.mem_get_info()[0] > need
        if "transformers" in o.vs and fits:
            with self.reported("transformers"):
                contenders |= peers.transformers(model, weights_of(model))
        self.measure(contenders)
        if "transformers" in o.vs and not fits:
            print("transformers runs after mixtral: they do not fit together")
            del model, contenders
            gc.collect()
            torch.cuda.empty_cache()
            with self.reported("transformers"):
                meta = self.build(*room, "meta")
                self.measure(peers.transformers(meta, meta.state_dict(), randomise))
        for peer in {name for r in self.results for name in r["first"]} - {"mixtral"}:
            firsts = [(r["first"].get(peer), r["first"].get("mixtral")) for r in self.results]
            same = [a == b for x, y in firsts if x and y for a, b in zip(x, y)]
            print(f"{peer}: {sum(same)} of {len(same)} first tokens are mixtral's")
        print(*self.ceilings, sep="\n")

    def long(self) -> None:
        """Prompts of 1024, 2048, ... tokens: time, and memory beyond the weights."""
        o = self.options
        o.batches, o.contexts, o.repeats = [], [], 1
        o.prompts = [2**i for i in range(10, o.longest.bit_length())]
        self.run()

    def measure(self, contenders: Mapping[str, Contender]) -> None:
        """Add each contender's seconds, and mixtral's floors, to each result."""
        for result in self.results:
            works = {}
            for name, contender in contenders.items():
                with self.reported(name, *result["case"]):
                    works[name] = self.warm(result, name, contender)
            with self.reported(*result["case"]):
                for _ in range(self.options.repeats if works else 0):
                    for ceilings in self.ceilings:
                        ceilings.measure()
                    for name, work in works.items():
                        result["seconds"].setdefault(name, []).append(seconds_of(work))
                if "mixtral" in works:
                    self.add_floors(result)
                self.show(self.line(result))

    def warm(self, result: dict, name: str, contender: Contender) -> Work:
        """Do a contender's work once, and return it."""
        (kind, batch, length), args, first = result["case"], self.args, []
        work = partial(contender.prefill, draw_prompts(args, batch, length))
        _, peak, _ = peak_of(lambda: first.append(work()), self.devices[0])
        result["first"][name] = first[0].tolist()
        if kind == "decode":
            work = partial(contender.decode, first[0], length, self.options.steps)
            given = work()
        if name == "mixtral" and kind == "decode":
            result["experts"] = contender.experts(given, length)
        elif name == "mixtral":  # by chance, as many experts as this have a token
            unused = (1 - args.num_experts_per_tok / args.num_experts) ** length
            used = args.num_experts * (1 - unused)
            result["experts"], result["memory"] = (used, used / len(self.devices)), peak
        return work

    def add_floors(self, result: dict) -> None:
        """The least seconds that mixtral's work takes, one for each round.

        The other devices wait for the one with most of the chosen experts. Logits are
        wanted after each row's last token only.
        """
        (kind, batch, new), a, o = result["case"], self.args, self.options
        times, context, (used, most) = 1, 0, result["experts"]
        if kind == "decode":
            times, context, new = o.steps, new + (o.steps - 1) // 2, 1
        layers = a.n_layers - o.cpu_layers  # whose experts are on the devices
        expert = 3 * a.dim * a.hidden_dim
        expert_bytes = 2 * expert
        if o.int8:
            expert_bytes = expert + 4 * (2 * a.hidden_dim + a.dim)
        shared = 2 * a.dim * a.head_dim * (a.n_heads + a.n_kv_heads)
        shared += a.dim * a.num_experts
        cache = batch * (context + new) * 2 * a.n_kv_heads * a.head_dim
        output = a.dim * a.vocab_size
        values = a.n_layers * (shared + 2 * a.dim + cache) + output
        values += a.dim * (1 + batch * new)
        pairs = a.n_layers * batch * new * (context + (new + 1) / 2)
        active = layers * a.num_experts_per_tok * expert / len(self.devices)
        ops = batch * new * (a.n_layers * shared + active) + batch * output
        ops += 2 * pairs * a.n_heads * a.head_dim
        result["bytes"] = times * (2 * values + layers * most * expert_bytes)
        result["host_bytes"] = times * o.cpu_layers * used * expert_bytes
        device, host = self.ceilings[0], self.ceilings[-1]
        result["floor"] = [
            max(result["bytes"] / device.bytes[i], 2 * times * ops / device.ops[i])
            + result["host_bytes"] / host.bytes[i]
            for i in range(-o.repeats, 0)
        ]

    def line(self, result: dict) -> str:
        kind, batch, length = result["case"]
        tokens = batch * (length if kind == "prefill" else self.options.steps)
        ours, text = result["seconds"].get("mixtral"), f"{kind} {batch} x {length}:"
        for name, seconds in result["seconds"].items():
            text += f" {name} {figures([tokens / s for s in seconds], ' tok/s')}"
            if name == "mixtral":
                text += f", {median(ratios(result['floor'], seconds)):.2f} of the floor"
                sheet = self.ceilings[0].sheet
                if kind == "prefill":
                    text += f", {result['memory']:.2f} GB beyond the weights"
                elif sheet:
                    share = result["bytes"] / median(seconds) / sheet
                    text += f", {share:.2f} of the data sheet"
            elif ours:
                text += f", {figures(ratios(seconds, ours), 'x')} mixtral's time"
            text += ";"
        return text[:-1]

    def load(self) -> None:
        """Loading each published layout from the page cache, beside cat."""
        from helpers.layouts import write

        o, model = self.options, self.build(1, 1, "cpu")
        once = [sys.executable, __file__, "load_once", f"--num-gpus={o.num_gpus}"]
        once += [f"--cpu-layers={o.cpu_layers}"] + ["--int8"] * o.int8
        for layout in o.layouts.split(","):
            with tempfile.TemporaryDirectory() as folder, self.reported(layout):
                with peers.uninitialised():
                    write(Path(folder), layout, model.params, model.state_dict())
                cat = partial(subprocess.run, f"cat {folder}/* >/dev/null", shell=True)
                cat()
                runs = []
                for _ in range(o.repeats):
                    seconds = seconds_of(cat)
                    printed = subprocess.check_output([*once, "--folder", folder])
                    runs.append({"cat": seconds, **json.loads(printed)})
                self.results.append({"case": layout, "runs": runs})
                each = {key: [run[key] for run in runs] for key in runs[0]}
                units = {"peak": " GB", "kept": " GB"}
                text = [f"{k} {figures(v, units.get(k, ' s'))}" for k, v in each.items()]
                times = figures(ratios(each["load"], each["cat"]), "x")
                self.show(f"layout {layout}: {times} cat's time; {', '.join(text)}")

    def load_once(self) -> None:
        """Load a folder and print the figures: a fresh process, which load starts."""
        models, tokens = [], torch.arange(8)[None]

        def work() -> None:
            params = read_params(self.options.folder, 64, 1)
            models.append(self.empty(params))
            load_checkpoint(models[0], self.options.folder)

        results = dict(zip(("load", "peak", "kept"), peak_of(work, "cpu")))
        for name in ("first", "second"):
            results[name] = seconds_of(lambda: models[0](tokens))
        print(json.dumps(results))


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    commands = ("run", "load", "long", "load_once")
    add("command", nargs="?", default="run", choices=commands)
    add("--size", default="mid", choices=SIZES)
    add("--layers", type=int, help="only so many of the size's layers")
    add("--num-gpus", type=int, default=int(on_gpu), help="0 is the CPU")
    add("--int8", action="store_true", help="experts in 8 bits")
    add("--cpu-layers", type=int, default=0, help="whose experts are in host memory")
    add("--repeats", type=int, default=3)
    add("--json", metavar="FILE", help="for all that is measured")
    add("--vs", default="", help="run beside transformers,llama.cpp")
    add("--batches", type=numbers, default="1,2,4,8,16", help="rows of a decode")
    add("--contexts", type=numbers, default="128,1024,4096", help="before a decode")
    add("--prompts", type=numbers, default="64,512,2048", help="to prefill")
    add("--steps", type=int, default=64 if on_gpu else 16, help="of a decode")
    add("--layouts", default="A,B,C,D-sharded", help="to load")
    add("--folder", help="of load_once")
    add("--longest", type=int, default=32768, help="prompt of long")
    benchmark = Benchmark(parser.parse_args())
    if benchmark.options.command != "load_once":
        benchmark.show(f"mixtral benchmark: {benchmark.machine}")
    getattr(benchmark, benchmark.options.command)()
    sys.exit(bool(benchmark.failures))


if __name__ == "__main__":
    main()
