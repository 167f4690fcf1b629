"""The time of a step of our optimizers beside PyTorch's and transformers', in one run, in turns.

    python optimizer_side_by_side.py PATH/optimizer-step [ROUNDS]

Both sides run on as many threads as OMP_NUM_THREADS says. Prints the median over the rounds of each, in ms, and the median
of the ratios of the rounds, ours to theirs.
"""

import subprocess
import sys
import time
from statistics import median

import torch
from transformers.optimization import Adafactor

SETS = {"lora": [(8, 576), (576, 8), (8, 576), (192, 8)] * 30, "10M": [(1024, 1024)] * 10}
STEPS = {"lora": 50, "10M": 4}
THEIRS = {
    ("AdamW", "fused"): lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    ("AdamW", "foreach"): lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    ("AdamW", "default"): lambda p: torch.optim.AdamW(p, lr=1e-3),
    ("SGD", "fused"): lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    ("SGD", "foreach"): lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    ("Adafactor", "transformers"): lambda p: Adafactor(p, lr=1e-3, relative_step=False),
}


def seconds(optimizer, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return (time.perf_counter() - began) / steps


def main():
    binary, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15
    ours = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(name: str, of: str, steps: int) -> float:
        ours.stdin.write(f"{name} {of} {steps}\n")
        ours.stdin.flush()
        return float(ours.stdout.readline())

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| optimizer | parameters | ours, ms | theirs | theirs, ms | ours / theirs |")
    print("|---|---|---|---|---|---|")
    for of, shapes in SETS.items():
        for (name, way), make in THEIRS.items():
            parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.rand_like(parameter)
            optimizer = make(parameters)
            steps = STEPS[of]
            ask(name, of, 3), seconds(optimizer, 3)
            pairs = [(ask(name, of, steps), seconds(optimizer, steps)) for _ in range(rounds)]
            a, b = median(a for a, _ in pairs), median(b for _, b in pairs)
            ratio = median(a / b for a, b in pairs)
            print(f"| {name} | {of} | {1e3 * a:.3f} | {way} | {1e3 * b:.3f} | {ratio:.2f} |", flush=True)
    ours.stdin.close()
    ours.wait()


main()
