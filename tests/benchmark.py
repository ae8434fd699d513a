"""How fast Mixtral is, beside the machine's own ceilings and beside other programs.

    python tests/benchmark.py [run] [--size mid] [--vs transformers,llama.cpp]
    python tests/benchmark.py load | start | ragged | long

Weights are random: what a step costs depends on them only through the experts that its
tokens choose, and these are counted. What is compared runs in turn, A B A B, and is
compared pair by pair: a machine's speed drifts. Figures are medians (least-greatest).
"""

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from json import dumps, loads
from pathlib import Path
from types import SimpleNamespace

import fire
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # it runs without the package being installed

from mixtral import Mixtral, ModelArgs, Transformer
from mixtral.checkpoint import load_checkpoint, read_params
from mixtral.model import Span

SIZES = {
    "demo": ModelArgs(160, 4, 32, 240, 6, 2, vocab_size=2048),
    "mid": ModelArgs(1024, 8, 128, 3584, 8, 2, vocab_size=32000),
    "8x7b": ModelArgs(),
}
PACKAGES = {"transformers": ["transformers"], "llama.cpp": ["llama_cpp", "gguf"]}
Work = Callable[[], object]


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def listed(value: object) -> list:
    """An option's values, which fire makes one value, a tuple, or a string with commas."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def figures(values: Sequence[float], unit: str = "") -> str:
    three = statistics.median(values), min(values), max(values)
    median, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in three)
    return f"{median}{unit} ({low}-{high})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def describe(devices: Sequence[str], packages: Sequence[str] = ()) -> str:
    """The machine, what runs on it, and how busy it is already."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [x.partition(": ")[2] for x in lines if x.startswith("model name")]
        name = (models or [name])[0]
    parts = [f"{name}, {torch.get_num_threads()} threads"]
    if devices != ["cpu"]:
        parts.insert(0, f"{len(devices)} x {torch.cuda.get_device_name(0)}")
    packages = [x.replace("llama.cpp", "llama_cpp_python") for x in packages]
    parts += [f"{package} {version(package)}" for package in ("torch", *packages)]
    parts += [f"python {platform.python_version()}", f"load {os.getloadavg()[0]:.1f}"]
    return "mixtral benchmark: " + ", ".join(parts)


def wait() -> None:
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.synchronize(i)


def seconds_of(work: Work) -> float:
    """Wall time until the devices are done too: what one who wants the tokens waits."""
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def peak_of(work: Work, device: str) -> tuple[float, float]:
    """A work's seconds, and the most GB that memory grew by during it.

    On the host that is memory which no file backs: mapped weights are not in it.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        seconds = seconds_of(work)
        return seconds, (torch.cuda.max_memory_allocated() - base) / 1e9

    def anonymous() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9

    samples, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    seconds = seconds_of(work)
    done.set()
    thread.join()
    return seconds, max([*samples, anonymous()]) - samples[0]


def interleave(
    works: Mapping[str, Work], repeats: int, ceilings: "Ceilings | None" = None
) -> dict[str, list[float]]:
    """Each work's seconds, one of each in turn; they have been done once already."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        if ceilings:
            ceilings.measure()
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    return seconds


class Ceilings:
    """A device's bytes and bf16 operations per second, measured in every round."""

    def __init__(self, device: str):
        self.n = 2048 if device == "cpu" else 8192
        self.a, self.b = torch.randn(2, self.n, self.n, device=device).bfloat16()
        self.bytes: list[float] = []
        self.ops: list[float] = []
        # 1 GiB, which no cache holds; read as float32, too, it is all finite numbers.
        buffer = torch.rand(2**20, device=device).bfloat16().repeat(2**9)
        longs, floats = buffer.view(torch.int64), buffer.view(torch.float32)
        methods: dict[str, Work] = {
            "int64 sum": longs.sum,
            "float32 sum": floats.sum,
            "float32 max": floats.amax,
            "float32 dot": lambda: floats.dot(floats),
        }
        if device != "cpu":
            target = torch.empty_like(buffer)
            methods = {"copy": lambda: target.copy_(buffer)}
        self.moved = buffer.nbytes * (1 if device == "cpu" else 2)
        best = {name: self.best_of(5, work) for name, work in methods.items()}
        self.method = min(best, key=best.__getitem__)
        self.read = methods[self.method]

    @staticmethod
    def best_of(times: int, work: Work) -> float:
        return min(seconds_of(work) for _ in range(times))

    def measure(self) -> None:
        self.bytes.append(self.moved / self.best_of(3, self.read))
        self.ops.append(2 * self.n**3 / self.best_of(3, lambda: self.a @ self.b))

    def __str__(self) -> str:
        gb, gflop = ([x / 1e9 for x in xs] for xs in (self.bytes, self.ops))
        return (
            f"ceilings: read {figures(gb, ' GB/s')} by {self.method}, "
            f"bf16 products {figures(gflop, ' GFLOP/s')}"
        )

    def floors(self, last: int, moved: float, ops: float) -> list[float]:
        """The least seconds that so many bytes and operations take, in the last rounds."""
        rounds = zip(self.bytes[-last:], self.ops[-last:])
        return [max(moved / b, ops / o) for b, o in rounds]


def cost(
    args: ModelArgs, batch: int, context: int, new: int, experts: float, n_devices: int
) -> tuple[float, float]:
    """The least bytes and operations of a forward of new tokens in each row of a batch.

    experts are those that its tokens chose, of a layer, on the device with most of them:
    the others wait for it. Logits are wanted after each row's last token only.
    """
    expert, output = 3 * args.dim * args.hidden_dim, args.dim * args.vocab_size
    attention = 2 * args.dim * args.head_dim * (args.n_heads + args.n_kv_heads)
    shared = attention + args.dim * args.num_experts
    cache = batch * (context + new) * 2 * args.n_kv_heads * args.head_dim
    layer = shared + 2 * args.dim + experts * expert + cache
    values = args.n_layers * layer + args.dim * (1 + batch * new) + output
    active = batch * new * (shared + args.num_experts_per_tok * expert / n_devices)
    pairs = batch * new * (context + (new + 1) / 2)
    active += 2 * pairs * args.n_heads * args.head_dim
    return 2 * values, 2 * (args.n_layers * active + batch * output)


@torch.inference_mode()
def randomise(model: nn.Module) -> None:
    """Weights that keep activations, and the gates' logits, at about unit size."""
    for name, p in model.named_parameters():
        p.normal_(std=1.0 if "embed" in name else p.shape[-1] ** -0.5)
        if p.dim() == 1:
            p.add_(1)


def draw_prompts(args: ModelArgs, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randint(3, args.vocab_size, (rows, length), generator=generator)
    return drawn.tolist()


class Ours:
    """The forwards that Mixtral.generate makes."""

    def __init__(self, model: Transformer):
        self.model, self.args = model, model.params
        no_end = SimpleNamespace(eos_id=-1)  # every row runs to max_gen_len
        self.generate = Mixtral(model, no_end).generate

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        spans = [Span(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
        tokens = torch.tensor(prompts).flatten()
        return self.model.forward_packed(tokens, spans, last_only=True).argmax(-1)

    def decode(self, tokens: Tensor, start: int, steps: int) -> Tensor:
        """The tokens given to each step, (steps, batch), the first of them tokens."""
        given = []
        for i in range(steps):
            given.append(tokens)
            spans = [Span(row, start + i, 1) for row in range(len(tokens))]
            tokens = self.model.forward_packed(tokens, spans).argmax(-1)
        return torch.stack(given)

    def experts(self, given: Tensor, start: int) -> tuple[float, float]:
        """How many experts of a layer a step used: in all, and on the device with most.

        The steps are taken again as one forward, in which every gate can be listened to.
        """
        chosen, top_k = [], self.args.num_experts_per_tok
        hooks = [
            layer.feed_forward.gate.register_forward_hook(
                lambda _, x, logits: chosen.append(logits.topk(top_k).indices)
            )
            for layer in self.model.layers
        ]
        spans = [Span(row, start, len(given)) for row in range(given.shape[1])]
        self.model.forward_packed(given.T.flatten(), spans, last_only=True)
        for hook in hooks:
            hook.remove()
        used = F.one_hot(torch.stack(chosen), self.args.num_experts).sum(2)
        used = used.unflatten(1, given.T.shape).any(1)  # (layers, steps, num_experts)
        each = used.unflatten(2, (len(self.model.devices), -1)).float().sum(3)
        return each.sum(2).mean().item(), each.amax(2).mean().item()


class Transformers:
    """transformers' model with one of its ways through the experts."""

    def __init__(self, model: nn.Module, args: ModelArgs, experts: str):
        self.model, self.args, self.experts, self.cache = model, args, experts, None

    def forward(self, tokens: Tensor) -> Tensor:
        options = {"past_key_values": self.cache, "logits_to_keep": 1}
        out = self.model(tokens.to(self.model.device), use_cache=True, **options)
        self.cache = out.past_key_values
        return out.logits[:, -1].argmax(-1)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.model.set_experts_implementation(self.experts)
        self.cache = None
        return self.forward(torch.tensor(prompts))

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        self.model.set_experts_implementation(self.experts)
        self.cache.crop(start - self.cache.get_seq_length())
        for _ in range(steps):
            tokens = self.forward(tokens[:, None])


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF of the same weights."""

    def __init__(self, model: Transformer, folder: str):
        import llama_cpp

        self.api, self.args, self.shape = llama_cpp, model.params, None
        path = Path(folder) / "model.gguf"
        write_gguf(path, model.params, model.state_dict())
        self.logger = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.logger, None)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0 if model.device.type == "cpu" else 999
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), options)

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        shape = rows, length = len(prompts), len(prompts[0])
        if self.shape != shape:  # a context with room for these, and for the steps
            if self.shape:
                self.api.llama_free(self.context)
                self.api.llama_batch_free(self.batch)
            options = self.api.llama_context_default_params()
            options.n_seq_max, options.n_batch = rows, rows * length
            options.n_ctx = rows * (length + 256)
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            self.context = self.api.llama_init_from_model(self.model, options)
            self.memory = self.api.llama_get_memory(self.context)
            self.batch, self.shape = (
                self.api.llama_batch_init(rows * length, 0, 1),
                shape,
            )
        self.api.llama_memory_clear(self.memory, False)
        return torch.tensor(self.forward(prompts, 0))

    def forward(self, rows: Sequence[Sequence[int]], start: int) -> list[int]:
        batch, ends, i = self.batch, [], 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, 0
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                i += 1
            batch.logits[i - 1] = 1
            ends.append(i - 1)
        batch.n_tokens, shape = i, (self.args.vocab_size,)
        if error := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returns {error}")
        logits = (self.api.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(np.ctypeslib.as_array(x, shape).argmax()) for x in logits]

    def decode(self, tokens: Tensor, start: int, steps: int) -> None:
        for row in range(len(tokens)):
            self.api.llama_memory_seq_rm(self.memory, row, start, -1)
        each = tokens.tolist()
        for i in range(steps):
            each = self.forward([[token] for token in each], start + i)


Contender = Ours | Transformers | LlamaCpp


def write_gguf(path: Path, args: ModelArgs, state: Mapping[str, Tensor]) -> None:
    """Write the weights for llama.cpp, where too a rotary pair lies side by side."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    sizes = """vocab_size=vocab_size context_length=max_seq_len embedding_length=dim
        block_count=n_layers feed_forward_length=hidden_dim head_count=n_heads
        head_count_kv=n_kv_heads key_length=head_dim value_length=head_dim
        rope_dimension_count=head_dim rope_freq_base=rope_theta expert_count=num_experts
        expert_used_count=num_experts_per_tok layer_norm_rms_eps=norm_eps"""
    for theirs, ours in (pair.split("=") for pair in sizes.split()):
        getattr(writer, f"add_{theirs}")(getattr(args, ours))
    names = {"layers.": "blk.", "tok_embeddings": "token_embd"}
    names |= {"attention_norm": "attn_norm", "attention.wo": "attn_output"}
    names |= {f"attention.w{x}": f"attn_{x}" for x in "qkv"}
    names |= {"feed_forward.gate": "ffn_gate_inp", "feed_forward.experts.0.": ""}
    names |= {"w1.": "ffn_gate_exps.", "w2.": "ffn_down_exps.", "w3.": "ffn_up_exps."}
    for name, tensor in state.items():
        if ".experts." in name:
            if ".experts.0." not in name:
                continue
            each = [name.replace(".0.w", f".{e}.w") for e in range(args.num_experts)]
            tensor = torch.stack([state[expert] for expert in each])
        theirs = "output_norm.weight" if name == "norm.weight" else name
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        if tensor.dim() == 1 or "gate_inp" in theirs:
            writer.add_tensor(theirs, tensor.float().cpu().numpy())
        else:
            kind = gguf.GGMLQuantizationType.BF16
            array = tensor.cpu().view(torch.uint8).numpy()
            writer.add_tensor(theirs, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Has transformers make models in bf16, and draw no weights for them."""
    from transformers.initialization import no_init_weights

    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def both_ways(model: Transformer) -> dict[str, Contender]:
    """transformers on the same weights; where ours are on meta, on weights of its own."""
    from reference import to_transformers

    with uninitialised(), model.device:
        peer = to_transformers(model.params, model.state_dict(), torch.bfloat16)
    if model.device.type == "meta":
        peer = peer.to_empty(device="cuda")
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config, "cuda")
        randomise(peer)
    ways = ("eager", "grouped_mm")
    return {f"transformers {w}": Transformers(peer, model.params, w) for w in ways}


def forget(files: Sequence[Path]) -> None:
    """Drop the files from the page cache, which drop_caches would empty for everyone."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(result: dict, steps: int) -> str:
    kind, batch, length = result["case"]
    seconds = dict(result["seconds"])
    ours = seconds.pop("mixtral")
    tokens = batch * (length if kind == "prefill" else steps)
    text = f"{kind}, batch {batch}, context {length}: "
    text += figures([tokens / s for s in ours], " tok/s")
    if result["floor"]:
        share = statistics.median(ratios(result["floor"], ours))
        text += f", {share:.2f} of the floor, {result['experts']:.1f} experts a layer"
    each = [f"{figures(ratios(s, ours), 'x')} {name}" for name, s in seconds.items()]
    return "; ".join([text, *[", ".join(each)] * bool(each)])


class Benchmark:
    """Measures Mixtral.

    Args:
        size: demo, mid or 8x7b
        layers: only so many of its layers
        num_gpus: 0 is the CPU; by default one GPU where there is one
        repeats: of everything
        json: file for all that was measured
    """

    def __init__(
        self,
        size: str = "mid",
        layers: int | None = None,
        num_gpus: int | None = None,
        repeats: int = 3,
        json: str | None = None,
    ):
        if num_gpus is None:
            num_gpus = int(torch.cuda.is_available())
        self._devices = [f"cuda:{i}" for i in range(num_gpus)] or ["cpu"]
        self._args = replace(SIZES[size], n_layers=layers or SIZES[size].n_layers)
        self._repeats, self._json = repeats, json

    def _build(self, rows: int, length: int, device: str | None = None) -> Transformer:
        devices = [device] if device else self._devices
        args = replace(self._args, max_batch_size=rows, max_seq_len=length)
        model = Transformer(args, devices)
        torch.manual_seed(0)
        log(f"random weights: {seconds_of(partial(randomise, model)):.1f} s")
        return model

    def _save(self, **results: object) -> None:
        if self._json:
            machine = describe(self._devices)
            text = dumps({"machine": machine, **results}, indent=1)
            Path(self._json).write_text(text + "\n")

    @torch.inference_mode()
    def run(
        self,
        vs: str | Sequence[str] = "",
        batches: Sequence[int] = (1, 2, 4, 8, 16),
        prompts: Sequence[int] = (64, 512, 2048),
        contexts: Sequence[int] = (128, 1024, 4096),
        steps: int | None = None,
    ) -> None:
        """Prefill and decode, as shares of their floors and beside other programs.

        Args:
            vs: transformers, llama.cpp, or both with a comma between
            batches: rows that decode at once, each after a prompt of contexts' first
            prompts: lengths of the one prompt of a prefill
            contexts: tokens before a decode of one row
            steps: in a decode, by default 16 on the CPU and 64 on a GPU
        """
        batches, prompts, contexts = listed(batches), listed(prompts), listed(contexts)
        cases = [("prefill", 1, n) for n in prompts]
        cases += [("decode", n, contexts[0]) for n in batches]
        cases += [("decode", 1, n) for n in contexts[1:]]
        cases += [("generate", 1, contexts[0])]
        results = [{"case": x, "seconds": {}, "first": {}, "floor": []} for x in cases]
        steps = steps or (16 if self._devices == ["cpu"] else 64)
        missing = {p: [m for m in PACKAGES[p] if not find_spec(m)] for p in listed(vs)}
        for peer, packages in missing.items():
            if packages:
                print(f"{peer} is left out, for want of {' and '.join(packages)}")
        peers = [peer for peer in missing if not missing[peer]]
        print(describe(self._devices, peers), flush=True)
        room = max(batches), max(*prompts, *contexts) + steps
        model = self._build(*room)
        ceilings = self._ceilings = Ceilings(self._devices[0])
        with tempfile.TemporaryDirectory() as folder:
            contenders: dict[str, Contender] = {"mixtral": Ours(model)}
            if "llama.cpp" in peers:
                contenders["llama.cpp"] = LlamaCpp(model, folder)
            # While to_transformers stacks the experts, they are there twice more.
            need = 2.2 * sum(p.nbytes for p in model.parameters())
            fits = self._devices == ["cpu"] or torch.cuda.mem_get_info()[0] > need
            if "transformers" in peers and fits:
                contenders |= both_ways(model)
            for result in results:
                log(*result["case"], "with", ", ".join(contenders))
                self._measure(result, contenders, steps)
                print(report(result, steps), flush=True)
        if "transformers" in peers and not fits:
            print("transformers runs after mixtral: they do not fit together")
            del model
            contenders.clear()
            gc.collect()
            torch.cuda.empty_cache()
            contenders = both_ways(self._build(*room, "meta"))
            for result in results[:-1]:
                self._measure(result, contenders, steps)
                print(report(result, steps), flush=True)
        print(ceilings)
        for peer in sorted(results[0]["first"].keys() - {"mixtral"}):
            firsts = [(r["first"]["mixtral"], r["first"][peer]) for r in results[:-1]]
            same = [a == b for ours, theirs in firsts for a, b in zip(ours, theirs)]
            print(f"{peer}: {sum(same)} of {len(same)} rows begin with the same token")
        rates = {"read": ceilings.method, "bytes": ceilings.bytes, "ops": ceilings.ops}
        self._save(peers=peers, ceilings=rates, steps=steps, results=results)

    def _measure(self, result: dict, contenders: dict, steps: int) -> None:
        """Add a case's seconds to its result, and mixtral's floor in each round."""
        kind, batch, length = result["case"]
        prompts = draw_prompts(self._args, batch, length)
        ours, works, given = contenders.get("mixtral"), {}, {}
        if kind != "generate":
            for name, each in contenders.items():
                works[name] = partial(each.prefill, prompts)
                first = works[name]()
                result["first"][name] = first.tolist()
                if kind == "decode":
                    works[name] = partial(each.decode, first, length, steps)
                    given[name] = works[name]()
        elif ours:
            decode = partial(ours.decode, start=length, steps=steps - 1)
            works["mixtral"] = partial(ours.generate, prompts, steps, 0)
            works["its forwards alone"] = lambda: decode(ours.prefill(prompts))
            works["mixtral"]()
        result["seconds"] |= interleave(works, self._repeats, self._ceilings)
        if not ours or kind == "generate":
            return
        args, n_devices = self._args, len(self._devices)
        if kind == "decode":
            result["experts"], most = ours.experts(given["mixtral"], length)
            step = cost(args, batch, length + (steps - 1) // 2, 1, most, n_devices)
            moved, ops = (steps * x for x in step)
        else:
            unused = (1 - args.num_experts_per_tok / args.num_experts) ** length
            result["experts"] = args.num_experts * (1 - unused)
            most = result["experts"] / n_devices
            moved, ops = cost(args, batch, 0, length, most, n_devices)
        result["floor"] = self._ceilings.floors(self._repeats, moved, ops)

    def load(
        self,
        gb: float = 2.0,
        layouts: str | Sequence[str] = "A,B,C,D-sharded",
        folder: str | None = None,
    ) -> None:
        """Loading each published layout, from memory and from the disk, beside cat.

        Args:
            gb: about the size of a checkpoint, of layers like size's
            layouts: of tests/layouts.py
            folder: where to write, by default where temporary files are
        """
        from layouts import write

        print(describe(self._devices, ["transformers", "safetensors"]), flush=True)
        two = Transformer(replace(self._args, n_layers=2, max_seq_len=1))
        layer = sum(p.nbytes for p in two.layers[0].parameters())
        rest = sum(p.nbytes for p in two.parameters()) - 2 * layer
        layers = max(1, round((gb * 1e9 - rest) / layer))
        self._args = replace(self._args, n_layers=layers)
        model, results = self._build(1, 1, "cpu"), {}
        for layout in listed(layouts):
            log(f"layout {layout}")
            with tempfile.TemporaryDirectory(dir=folder) as written:
                with uninitialised():
                    write(Path(written), layout, model.params, model.state_dict())
                for case in ("warm", "cold"):
                    name = f"{layout}, {case}"
                    results[name] = self._load(Path(written), case == "cold", name)
        self._save(results=results)

    def _load(self, folder: Path, cold: bool, name: str) -> dict[str, list[float]]:
        files = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
        cat = ["cat", *map(str, files)]
        cat_files = partial(subprocess.run, cat, stdout=subprocess.DEVNULL, check=True)
        gpus = len(self._devices) * (self._devices != ["cpu"])
        once = [sys.executable, __file__, "load_once", f"--folder={folder}"]
        once += [f"--num-gpus={gpus}"]
        cat_files()
        t: dict[str, list[float]] = {"cat": []}
        for _ in range(self._repeats):
            forget(files if cold else [])
            t["cat"].append(seconds_of(cat_files))
            forget(files if cold else [])
            for key, value in loads(subprocess.check_output(once)).items():
                t.setdefault(key, []).append(value)
        size = sum(file.stat().st_size for file in files) / 1e9
        print(
            f"{name}: {figures(t['load'], ' s')}, "
            f"{figures([size / s for s in t['load']], ' GB/s')}, "
            f"{figures(ratios(t['load'], t['cat']), 'x')} cat's time; "
            f"{figures(t['memory'], ' GB')} not mapped; first forward "
            f"{figures(t['first'], ' s')}, second {figures(t['second'], ' s')}",
            flush=True,
        )
        return t

    def load_once(self, folder: str) -> None:
        """Load a folder and print the seconds: a fresh process, which load starts."""
        models, tokens = [], torch.arange(8)[None]

        def work() -> None:
            models.append(Transformer(read_params(folder, 64, 1), self._devices))
            load_checkpoint(models[0], folder)

        results = dict(zip(("load", "memory"), peak_of(work, "cpu")))
        for name in ("first", "second"):
            results[name] = seconds_of(lambda: models[0](tokens))
        print(dumps(results))

    def start(self, ckpt_dir: str = str(ROOT / "tests" / "demo")) -> None:
        """From the start of the example script's process to its first token.

        Args:
            ckpt_dir: a checkpoint with its tokenizer.model
        """
        print(describe(self._devices), flush=True)
        gpus = len(self._devices) * (self._devices != ["cpu"])
        script = [str(ROOT / "example_text_completion.py"), "--ckpt-dir", ckpt_dir]
        script += ["--tokenizer-path", str(Path(ckpt_dir) / "tokenizer.model")]
        script += [f"--num-gpus={gpus}", "--max-gen-len=1", "--prompt=And"]

        def until(line: str, *arguments: str) -> None:
            """Run Python until it prints a line that begins so."""
            command = [sys.executable, "-u", *arguments]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(command, text=True, cwd=ROOT, **options) as process:
                if not any(printed.startswith(line) for printed in process.stdout):
                    raise RuntimeError(f"{' '.join(command)} does not come to {line}")

        codes = {"python": "", "import torch": "import torch; "}
        codes["import mixtral"] = "import mixtral; "
        works = {
            k: partial(until, ">", "-c", f"{v}print('>')") for k, v in codes.items()
        }
        works["first token"] = partial(until, ">", *script)
        works["first token"]()
        seconds = interleave(works, self._repeats)
        for name, each in seconds.items():
            share = figures(ratios(each, seconds["first token"]))
            print(f"{name}: {figures(each, ' s')}, {share} of all")
        self._save(seconds=seconds)

    def ragged(self, lengths: Sequence[int] = (10, 1000), steps: int = 16) -> None:
        """Prompts of different lengths in one batch, beside the longest alone.

        Args:
            lengths: of the prompts
            steps: new tokens after each
        """
        print(describe(self._devices), flush=True)
        ours = Ours(self._build(len(lengths), max(lengths) + steps))
        prompts = [draw_prompts(self._args, 1, n)[0] for n in lengths]
        works, longest = {}, max(prompts, key=len)
        for n in (1, steps):
            works[f"together {n}"] = partial(ours.generate, prompts, n, 0)
            works[f"alone {n}"] = partial(ours.generate, [longest], n, 0)
        works[f"together {steps}"]()
        seconds = interleave(works, self._repeats)
        for n in (1, steps):
            both, alone = seconds[f"together {n}"], seconds[f"alone {n}"]
            print(
                f"prompts of {lengths} tokens, {n} new: {figures(both, ' s')}, "
                f"{figures(ratios(both, alone), 'x')} the longest alone"
            )
        self._save(seconds=seconds)

    def long(self, longest: int = 32768) -> None:
        """One prompt of 1024, 2048, ... tokens: time, and memory beyond the weights.

        Args:
            longest: tokens of the last prompt
        """
        print(describe(self._devices), flush=True)
        ours, n_devices = Ours(self._build(1, longest)), len(self._devices)
        ceilings, results = Ceilings(self._devices[0]), {}
        ours.generate(draw_prompts(self._args, 1, 64), 1, 0)
        experts = self._args.num_experts / n_devices
        for n in (2**i for i in range(10, longest.bit_length())):
            ceilings.measure()
            work = partial(ours.generate, draw_prompts(self._args, 1, n), 1, 0)
            seconds, memory = peak_of(work, self._devices[0])
            moved, ops = cost(self._args, 1, 0, n, experts, n_devices)
            share = ceilings.floors(1, moved, ops)[0] / seconds
            print(
                f"prompt of {n}: {seconds:.2f} s, {n / seconds:.0f} tok/s, "
                f"{share:.2f} of the floor, {memory:.2f} GB beyond the weights",
                flush=True,
            )
            results[n] = {"seconds": seconds, "memory": memory}
        print(ceilings)
        self._save(results=results)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and "--help" not in arguments):
        arguments.insert(0, "run")
    fire.Fire(Benchmark, arguments)
