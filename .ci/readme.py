"""Run the Python cells of the README on small data, in an empty folder.

.venv/bin/python .ci/readme.py        (needs matplotlib and scikit-learn)

First each chapter alone, then all chapters in one process, as in one notebook.
"""

import csv
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cnn_mnist  # noqa: E402
import common  # noqa: E402
import rnn_mnist  # noqa: E402
import test_scripts  # noqa: E402


def make_files():
    """Make the files that the cells read: a small MNIST, a picture, sequences, folders."""
    torch.manual_seed(0)
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
        # Three sensors with different units; the classes differ in the third one, the smallest.
        units = torch.tensor([[1000.0, 300.0], [20.0, 3.0], [0.5, 0.02]])
        for number, name in enumerate(("walk", "run", "climb") * 200):
            values = torch.randn(50, 3) + torch.tensor([0.0, 0.0, 3.0 * (number % 3)])
            writer.writerow([name, *(units[:, 0] + units[:, 1] * values).flatten().tolist()])
        file.write("\n")
    for split in ("train", "test"):
        for name, colour in (("oak", "green"), ("maple", "red")):
            folder = Path("leaves", split, name)
            folder.mkdir(parents=True)
            for number in range(20):
                Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.jpg")
    Image.new("RGB", (60, 50), "green").save("leaf.jpg")


def run(title, program, *options):
    """Run a program in a new process."""
    print(f"---- {title} ----", flush=True)
    Path("program.py").write_text(program, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "program.py", *options], env=env, check=True)


def section(name):
    """Return the section of common.py with this heading."""
    pattern = rf"# ---- {name} ----.*?(?=# ---- )"
    return re.search(pattern, inspect.getsource(common), re.DOTALL)[0]


def pasted(program, network):
    """Return the file to hand in with what it asks to paste, and the network of that name."""
    script = cnn_mnist if network == "CNN" else rnn_mnist
    content = inspect.getsource(getattr(script, network)) + section("loaders and evaluation")
    program, count = re.subn("# Paste here .*", lambda _: content, program)
    assert count == 1
    return program.replace("model = CNN()", f"model = {network}()")


readme = (ROOT / "README.md").read_text(encoding="utf-8")
chapters = {}
for chapter in re.split(r"^## ", readme, flags=re.M)[1:]:
    cells = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)
    if cells:
        chapters[chapter.partition("\n")[0]] = cells

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    make_files()
    (own_network,) = chapters.pop("Your own network as a program")
    run("an own network as a program", own_network, "--epochs", "1")
    (hand_in,) = chapters.pop("One file to hand in")
    # With the CNN, it trains as the script does, up to the rounding.
    check = 'import cnn_mnist\n_, expected = cnn_mnist.main("--device auto")\n'
    check += "assert abs(evaluation.loss - expected.loss) < 0.01\n"
    run("the file to hand in, CNN", pasted(hand_in, "CNN") + check)
    run("the file to hand in, RNN", pasted(hand_in, "RNN"))
    augmented = hand_in.replace("# batch = ", "batch = ")
    validated = augmented.replace(
        "Loader(images, labels,", "Loader(images[:-5000], labels[:-5000],"
    )
    validated = re.sub(
        "(?m)^eval_loader = .*", "eval_loader = Loader(images[-5000:], labels[-5000:])", validated
    )
    pictures = section("pictures of your own").partition("@torch.no_grad()")[0]
    imports = "from PIL import Image, ImageOps\nfrom torchvision.transforms.functional import "
    imports += "pil_to_tensor, resize, resized_crop\n"
    print_digit = 'print(model.to("cpu").eval()(read_picture("seven.png")[None]).argmax())\n'
    everything = imports + pasted(validated, "CNN") + pictures + print_digit
    run("the file to hand in, augmented, validated, with pictures", everything)
    for title, cells in chapters.items():
        run(f"{title}, alone", "\n".join(cells))
    # Chance is 1/3: there are three classes.
    (lines,) = re.findall(r"insert `(used = .*?)` and `(sequences.*?)` before", readme)
    sequences = chapters["Your own data"][0].replace("loaders =", "\n".join([*lines, "loaders ="]))
    run("sequences, standardized", sequences + "assert evaluation.accuracy > 0.7\n")
    run("all in one", "\n".join(cell for cells in chapters.values() for cell in cells))
    os.chdir(ROOT)
