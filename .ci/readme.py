"""Run the Python cells of the README in order, on small data, in an empty folder.

.venv/bin/python .ci/readme.py        (needs matplotlib and scikit-learn)
"""

import csv
import inspect
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "Agg"
sys.path.insert(0, str(ROOT))

import cnn_mnist  # noqa: E402
import common  # noqa: E402
import test_scripts  # noqa: E402


def make_files():
    """Make the files that the cells read: a small MNIST, a picture, sequences, folders."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for split, count in (("train", 5500), ("t10k", 500)):
        images, labels = common.draw_digits(count, torch.Generator().manual_seed(count))
        test_scripts.write_idx(raw / f"{split}-images-idx3-ubyte", images)
        test_scripts.write_idx(raw / f"{split}-labels-idx1-ubyte", labels.byte())
    test_scripts.draw_page(7).save("seven.png")
    with open("walks.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["activity", *range(150)])
        for name in ("walk", "run", "climb") * 100:
            writer.writerow([name, *torch.randn(150).tolist()])
    for split in ("train", "test"):
        for name, colour in (("oak", "green"), ("maple", "red")):
            folder = Path("leaves", split, name)
            folder.mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.jpg")
    Image.new("RGB", (60, 50), "green").save("leaf.jpg")


def pasted(program):
    """Return the file to hand in with what it asks to paste."""
    section = r"# ---- loaders and evaluation.*(?=# ---- report ----)"
    section = re.search(section, inspect.getsource(common), re.DOTALL)[0]
    content = inspect.getsource(cnn_mnist.CNN) + section
    program, count = re.subn("# Paste here .*", lambda _: content, program)
    assert count == 1
    return program


cells = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
*coursework, hand_in = cells
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    make_files()
    namespace = {}
    for number, cell in enumerate(coursework, start=1):
        print(f"---- cell {number} of {len(coursework)} ----", flush=True)
        exec(compile(cell, f"cell {number}", "exec"), namespace)
    print("---- the file to hand in ----", flush=True)
    namespace = {}
    exec(compile(pasted(hand_in), "hand_in.py", "exec"), namespace)
    _, expected = cnn_mnist.main("--device auto")
    difference = abs(namespace["evaluation"].loss - expected.loss)
    assert difference < 0.01, difference  # the memory format may change the rounding
    os.chdir(ROOT)
