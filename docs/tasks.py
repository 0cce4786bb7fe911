"""Draws docs/tasks.png: one recorded demonstration of each of the five tasks, as the primary camera saw it.

python docs/tasks.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.lerobot import LeRobotReader  # noqa: E402

COLUMNS, SIDE, GAP, LABEL = 6, 150, 6, 24  # frames a task; pixels of a frame, between frames, and of a line of text


def main() -> None:
    reader = LeRobotReader(ROOT / "data/tiny")
    first = {}  # the two cups are one task
    for i in range(reader.num_episodes):
        text = reader.episode(i)["task"]
        first.setdefault(text.replace("blue", "red"), (i, text))
    step = SIDE + LABEL + GAP
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, len(first) * step + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for row, (i, text) in enumerate(first.values()):
        draw.text((GAP, row * step + 5), text, "black", font)
        times = np.linspace(0, reader.lengths[i] - 1, COLUMNS).round().astype(int)
        for column, image in enumerate(reader.frames(i, "primary", times)):
            picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            page.paste(picture, (GAP + column * (SIDE + GAP), row * step + LABEL + GAP))
    page.quantize(128).save(ROOT / "docs/tasks.png")  # a third of the size, to the eye the same


if __name__ == "__main__":
    main()
