"""Speed, start-up time and memory of controlgen beside transformers and candle, in one run.

    python side_by_side.py MODEL_DIR [--controlgen target/release/conformance] [--candle .../candle-generate]
        [--candle-portable .../candle-generate]
        [--dtypes f32,bf16] [--alternations 5] [--new-tokens 128] [--threads 2] [--json FILE]
        [--controlgen-arguments "..."]

prints Markdown. How it is kept fair, and where it leans:

* Every peer reads the same directory, runs the same prompt ids and makes the same number of tokens, greedily.
  min_new_tokens = max_new_tokens, so the end token stops nobody (candle has no end token here).
* Two threads each (OMP_NUM_THREADS, RAYON_NUM_THREADS, torch.set_num_threads); one peer runs at a time; the order
  turns by one at each alternation; medians, with the least and the greatest beside them.
* Seconds are those each peer reports from inside: loading and starting are not in them. transformers stays loaded and
  is warmed by one run of each task; controlgen and candle start a new process at each alternation, so their first run
  is what counts. That favours transformers. (--controlgen-arguments may add arguments such as one for repeats: the
  last line of the output counts.)
* tokens per second = new tokens / (prefill + decode). Decode alone = (new tokens - 1) / decode seconds.
* Eight rows: num_return_sequences = 8 of one prompt, sampled with top_k = 1. transformers and candle run the prompt in
  all eight rows; whoever shares its prefill gains by that.
* Start: wall time of a whole fresh process that loads, tokenises a text, makes one token and decodes it; after one
  warming run, so files come from the page cache. candle gets token ids: it loads no tokenizer.
* Memory: the greatest resident set of the process (ru_maxrss, the kernel's VmHWM) in the start and decode tasks.
* candle is built with target-cpu=native, as its own repository does; a build with cargo's defaults, which is what a
  crate that depends on it gets, may stand beside it (--candle-portable).
* Different ids of two peers are reported; in bf16 roundings differ and so may texts.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT = "The history of the city begins long before the first stone bridge was built across the river"
# What the project promises: ratio of controlgen to the peer, and whether it must be at least or at most that.
PROMISES = {
    ("decode", "bf16", "transformers"): (">=", 2.0), ("decode", "bf16", "candle"): (">=", 3.0),
    ("decode", "f32", "transformers"): (">=", 1.4), ("decode", "f32", "candle"): (">=", 1.0),
    ("prefill", "f32", "transformers"): (">=", 1.3), ("prefill", "bf16", "transformers"): (">=", 1.3),
    ("rows", "f32", "transformers"): (">=", 1.5), ("rows", "bf16", "transformers"): (">=", 1.5),
    ("start", "f32", "transformers"): ("<=", 0.3), ("start", "bf16", "transformers"): ("<=", 0.3),
    ("memory", "f32", "transformers"): ("<=", 0.7), ("memory", "bf16", "transformers"): ("<=", 0.7),
}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def spawn(command, environment):
    """Runs to the end: the JSON lines it printed, wall seconds, peak resident bytes.

    This program stays small (no torch), because the kernel counts the memory of the parent at the fork into the
    child's ru_maxrss.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            fail(f"{' '.join(map(str, command))[:300]}\nexit code {child.returncode}: "
                 f"{err.read().decode(errors='replace')[-2000:]}")
        lines = [json.loads(line) for line in out.read().decode().splitlines() if line.startswith("{")]
    if not lines:
        fail(f"{command[0]} printed no JSON line")
    return lines, seconds, usage.ru_maxrss * 1024


class Transformers:
    """A loaded server for the speed tasks; fresh processes for start and memory."""

    name = "transformers"

    def __init__(self, a, dtype, environment):
        self.command = [sys.executable, str(HERE / "transformers_peer.py"), a.model, "--dtype", dtype,
                        "--threads", str(a.threads)]
        self.environment = environment
        self.server = subprocess.Popen(self.command + ["--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True, env=environment)

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        if not answer:
            fail("the transformers server ended; run transformers_peer.py by hand to see why")
        return json.loads(answer)

    def run(self, ids, new_tokens, rows):
        return self.ask(input_ids=ids, max_new_tokens=new_tokens, rows=rows), None

    def start(self, text, ids, new_tokens):
        return spawn(self.command + ["--prompt", text, "--max-new-tokens", str(new_tokens)], self.environment)

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Candle:
    name = "candle"
    option = "candle"

    def __init__(self, a, dtype, environment):
        self.command = [getattr(a, self.option), a.model, "--dtype", dtype]
        self.environment = environment

    def run(self, ids, new_tokens, rows):
        lines, _, peak = spawn(self.command + ["--input-ids", joined(ids), "--max-new-tokens", str(new_tokens),
                                               "--batch", str(rows)], self.environment)
        return lines[-1], peak

    def start(self, text, ids, new_tokens):
        return spawn(self.command + ["--input-ids", joined(ids), "--max-new-tokens", str(new_tokens)],
                     self.environment)

    def close(self):
        pass


class PortableCandle(Candle):
    name = "candle, portable"
    option = "candle_portable"


class Controlgen:
    name = "controlgen"

    def __init__(self, a, dtype, environment):
        self.command = [a.controlgen, "generate", a.model, "--dtype", dtype, "--device", "cpu",
                        *shlex.split(a.controlgen_arguments)]
        self.environment = environment
        self.folder = tempfile.TemporaryDirectory()

    def config(self, new_tokens, rows):
        values = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": rows > 1}
        if rows > 1:
            values |= {"top_k": 1, "num_return_sequences": rows}
        path = Path(self.folder.name) / f"{new_tokens}-{rows}.json"
        path.write_text(json.dumps(values))
        return ["--config", str(path)]

    def run(self, ids, new_tokens, rows):
        lines, _, peak = spawn(self.command + ["--input-ids", joined(ids)] + self.config(new_tokens, rows),
                               self.environment)
        return lines[-1], peak

    def start(self, text, ids, new_tokens):
        return spawn(self.command + ["--prompt", text] + self.config(new_tokens, 1), self.environment)

    def close(self):
        self.folder.cleanup()


def joined(ids):
    return ",".join(map(str, ids))


def tasks(a, ids):
    """name -> (ids, new tokens, rows, figure made of the answer)."""
    long = (ids * 40)[:512]
    return {
        "decode": (ids, a.new_tokens, 1, lambda r: r["tokens_per_second"]),
        "decode only": (ids, a.new_tokens, 1, lambda r: (a.new_tokens - 1) / r["decode_seconds"]),
        "prefill": (long, 1, 1, lambda r: 512 / r["prefill_seconds"]),
        "rows": (ids, a.new_tokens // 2, 8, lambda r: r["tokens_per_second"]),
    }


LABELS = {
    "decode": "{n} tokens, batch 1, tok/s", "decode only": "of these, decode alone, tok/s",
    "prefill": "prefill of 512, tok/s", "rows": "batch 8, {h} tokens each, tok/s",
    "start": "process start to first token, s", "memory": "peak memory, MB",
}


def measure(a, dtype, ids, environment):
    """figures[task][peer] = one number an alternation; texts[task][peer] = ids of the last answer."""
    optional = [(a.candle, Candle), (a.candle_portable, PortableCandle), (a.controlgen, Controlgen)]
    peers = [kind(a, dtype, environment) for kind in [Transformers] + [k for path, k in optional if path]]
    figures = {task: {p.name: [] for p in peers} for task in LABELS}
    made = {}
    plan = {k: v for k, v in tasks(a, ids).items() if k != "decode only"}
    derived = tasks(a, ids)["decode only"][3]
    server = peers[0]
    for task_ids, new_tokens, rows, _ in plan.values():
        server.run(task_ids, min(new_tokens, 8), rows)
    for p in peers:
        p.start(PROMPT, ids, 1)
    speed = server.ask(bandwidth=True)["bytes_per_second"]
    for turn in range(a.alternations):
        order = peers[turn % len(peers):] + peers[:turn % len(peers)]
        for task, (task_ids, new_tokens, rows, figure) in plan.items():
            for p in order:
                answer, _ = p.run(task_ids, new_tokens, rows)
                figures[task][p.name].append(figure(answer))
                if task == "decode":
                    figures["decode only"][p.name].append(derived(answer))
                made.setdefault(task, {})[p.name] = answer["sequences"][0]["ids"]
        for p in order:
            _, seconds, _ = p.start(PROMPT, ids, 1)
            figures["start"][p.name].append(seconds)
            _, _, peak = p.start(PROMPT, ids, a.new_tokens)
            figures["memory"][p.name].append(peak / 1e6)
        print(f"{dtype}: alternation {turn + 1} of {a.alternations}", file=sys.stderr)
    speed = max(speed, server.ask(bandwidth=True)["bytes_per_second"])
    for p in peers:
        p.close()
    return figures, made, speed


def differences(made):
    """Where two peers' ids part, if they do."""
    notes = []
    for task, by_peer in made.items():
        reference = by_peer["transformers"]
        for peer, ids in by_peer.items():
            if ids != reference:
                at = next((i for i, (x, y) in enumerate(zip(ids, reference)) if x != y), min(len(ids), len(reference)))
                notes.append(f"{task}: {peer} leaves transformers' tokens at {at} of {len(reference)}")
    return notes


def shown(values):
    middle = statistics.median(values)
    digits = 0 if middle >= 200 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(a, dtype, figures):
    peers = list(next(iter(figures.values())))
    ours = "controlgen" in peers
    others = [p for p in peers if p != "controlgen"]
    head = [dtype, *peers] + ([f"controlgen / {p}" for p in others] if ours else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, label in LABELS.items():
        cells = [label.format(n=a.new_tokens, h=a.new_tokens // 2), *(shown(figures[task][p]) for p in peers)]
        for p in others if ours else []:
            ratio = statistics.median(figures[task]["controlgen"]) / statistics.median(figures[task][p])
            cell = f"{ratio:.2f}"
            promise = PROMISES.get((task, dtype, p))
            if promise:
                sign, bound = promise
                held = ratio >= bound if sign == ">=" else ratio <= bound
                cell += f" ({'holds' if held else 'MISSED'}: {'≥' if sign == '>=' else '≤'} {bound})"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weight_bytes(folder, dtype):
    """Bytes of weights that a token reads: all of them once, in the dtype of the run."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for n in tensor["shape"]:
                    count *= n
                total += count
    return total * {"f32": 4, "bf16": 2}[dtype]


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def prompt_ids(model):
    """Ids of PROMPT, from a short-lived process: this one stays small."""
    code = ("import sys; from transformers import AutoTokenizer; "
            "print(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2]).input_ids)")
    out = subprocess.run([sys.executable, "-c", code, model, PROMPT], capture_output=True, text=True)
    if out.returncode != 0:
        fail(f"no tokenizer in {model}: {out.stderr[-1000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--controlgen", help="the release binary `conformance`")
    parser.add_argument("--controlgen-arguments", default="")
    parser.add_argument("--candle", help="the binary `candle-generate` of benches/peers")
    parser.add_argument("--candle-portable", help="the same, built without target-cpu=native")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    a = parser.parse_args()
    if not (Path(a.model) / "config.json").is_file():
        fail(f"{a.model}: no config.json; expected a Hugging Face directory")
    if a.controlgen and not Path(a.controlgen).is_file():
        fail(f"{a.controlgen}: no such file; build it with `cargo build --release -p benches --bin conformance`")
    for path in filter(None, (a.candle, a.candle_portable)):
        if not Path(path).is_file():
            fail(f"{path}: no such file; build it with `cd benches/peers && cargo build --release`")
    threads = str(a.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                                "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ids = prompt_ids(a.model)
    print(f"{processor()}, {os.cpu_count()} logical processors, {threads} threads a peer, load before the run "
          f"{os.getloadavg()[0]:.2f}; prompt of {len(ids)} tokens; medians of {a.alternations} alternations "
          "(least–greatest).\n")
    if os.getloadavg()[0] > 0.5:
        print("The machine was busy when this began: these figures are not fit to be quoted.\n")
    if not a.controlgen:
        print("Peers only: no --controlgen was given.\n")
    kept = {}
    for dtype in a.dtypes.split(","):
        figures, made, speed = measure(a, dtype, ids, environment)
        kept[dtype] = {"figures": figures, "ids": made, "bytes_per_second": speed}
        print(table(a, dtype, figures))
        size = weight_bytes(a.model, dtype)
        roof = speed / size
        shares = ", ".join(f"{p} {statistics.median(v) / roof:.0%}" for p, v in figures["decode only"].items())
        print(f"\nRoofline: {speed / 1e9:.1f} GB/s read, {size / 1e6:.0f} MB of weights a token: {roof:.1f} tok/s. "
              f"Share of it in decode alone: {shares}.")
        for note in differences(made):
            print(f"\n{note}.")
        print(flush=True)
    if a.json:
        Path(a.json).write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
