"""Run the Python cells of the README on small data, in an empty folder.

.venv/bin/python .ci/readme.py        (needs matplotlib, pandas and ruff)
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cnn_mnist  # noqa: E402
import common  # noqa: E402
import rnn_mnist  # noqa: E402
import test_scripts  # noqa: E402


def make_files():
    """Make the files that the cells read: a small MNIST, sequences, pictures in folders."""
    torch.manual_seed(0)
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for split, count in (("train", 5500), ("t10k", 500)):
        images, labels = common.draw_digits(count)
        test_scripts.write_idx(raw / f"{split}-images-idx3-ubyte", images)
        test_scripts.write_idx(raw / f"{split}-labels-idx1-ubyte", labels.byte())
    # Three sensors with different units; the classes differ in the third one, the smallest.
    values = torch.randn(600, 50, 3)
    values[:, :, 2] += 3 * (torch.arange(600) % 3)[:, None]
    values = values * torch.tensor([300, 3, 0.02]) + torch.tensor([1000, 20, 0.5])
    table = pandas.DataFrame(values.flatten(1).numpy())
    table.insert(0, "activity", ["walk", "run", "climb"] * 200)
    table.insert(0, "person", [f"P{row // 30}" for row in range(600)])
    table.to_csv("walks.csv", index=False)
    for part in ("train", "val"):
        for name, colour in (("oak", "green"), ("maple", "red")):
            folder = Path("leaves", part, name)
            folder.mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.jpg")
    Image.new("RGB", (60, 50), "green").save("leaf.jpg")


def run(title, program):
    """Check a program for undefined names, and run it in a new process."""
    print(f"---- {title} ----", flush=True)
    Path("program.py").write_text(program, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "program.py"]
    subprocess.run(ruff, check=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "program.py"], env=env, check=True)


def replace(text, old, new):
    """Replace `old` in the text, where it has to be once."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


IMPORTS = """\
import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
"""


def hand_in(script, name, lines):
    """Return the file to hand in, and a check that it trains the same weights as the script."""
    source = inspect.getsource(common)
    (sections,) = re.findall(r"# ---- core ----.*?(?=# ---- data ----)", source, re.DOTALL)
    named = sections.partition("\n\n")[0]  # The comment names the imports.
    for word in re.findall(r"(\w+)$", IMPORTS, re.MULTILINE):
        assert re.search(rf"\b{word}\b", named), word
    network, train = (inspect.getsource(part) for part in (getattr(script, name), script.train))
    program = replace(lines, "train(CNN,", f"train({name},")
    file = "\n\n".join([IMPORTS, sections, network, train, program])
    print(len(file.splitlines()), "lines")
    check = f"""
import {script.__name__} as script, common
expected, _ = script.train(script.{name}, common.load_data())
for mine, theirs in zip(model.parameters(), expected.parameters()):
    assert torch.equal(mine, theirs)
"""
    return file + check


readme = (ROOT / "README.md").read_text(encoding="utf-8")
chapters = {}
for chapter in re.split(r"^## ", readme, flags=re.M)[1:]:
    chapters[chapter.partition("\n")[0]] = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    make_files()
    run("a coursework", "\n".join(chapters["Coursework in a notebook"]))
    sequences, pictures = chapters["Your own data"]
    # Chance is 1/3 and 1/2.
    run("own sequences", sequences + "assert history[-1].val_accuracy > 0.7\n")
    run("own pictures", pictures + "assert history[-1].val_accuracy == 1\n")
    (lines,) = chapters["One file to hand in"]
    run("the file to hand in, CNN", hand_in(cnn_mnist, "CNN", lines))
    run("the file to hand in, RNN", hand_in(rnn_mnist, "RNN", lines))
    os.chdir(ROOT)
