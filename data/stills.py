"""Still scenes, with the names of what they show and where it is: for the sizes that start from random weights they
are what images of the web, captions and boxes are to the pretrained models of the full size (see `pretrain.py`).

    python -m data.stills --sheet docs/stills.png      # a picture of some, with their boxes

A scene is one of play's (`data.scenes`) in which nothing happens and no physics is run: bodies in random poses above
random things, seen by their cameras.

What they share with the five tasks of franka.py. As in play: the FR3, its table, light and the two places of its
primary camera, which most scenes have. Unlike play also categories: among the things are household ones, as images of
the web show and PaliGemma's captions and boxes name them: cups and mugs, pots with two handles, ovens and cabinets with
a door, brushes, bowls, some with a sauce, blocks, boards with a slot. What they do not: these are `household`'s own
shapes, of random proportions, colours and numbers in random places, none of franka.py's geometry, sizes or exact
colours; no goal and nothing that happens: sentences about them (`ask`) are commands that nobody carries out. So a cup
has been seen and named before the tasks, those cups have not. All methods get this start alike, and play still holds
these categories out.

Boxes are of what can be seen of a thing, found by drawing the scene once more with a colour for each thing. Every
number without a source is our choice."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import InputError
from data.bodies import tint
from data.families import Family
from data.scenes import GRASPABLE, HIGH, LOW, Crowded, Scene, Thing
from franka import Cameras, World, add_free, add_geom, pointing_down

PER_SCENE = 6  # stills: to build a scene takes longer than to draw it
SMALLEST = 12 / 96**2  # share of the image that must be seen of a thing for it to be named
HOUSEHOLD = ("cup", "mug", "pot", "oven", "cabinet", "brush", "bowl", "block", "slot")
NOUNS = (*GRASPABLE, "tray", "box", "basket", "plate", "platform", *HOUSEHOLD, "sauce", "gripper", "hand")
LARGE = ("oven", "cabinet")  # one of them in a scene, behind the rest
ASKED = 5  # things at most that a question names
PLAIN = 0.4  # share of the names without a colour, where it is clear what is meant
KINDS = ("detect", "describe", "refer")  # of questions, see `ask`
SENTENCES = ("lift the {}", "grab the {}", "turn the {}", "push the {} forwards", "push the {} to the left",
             "move the {} to the right", "set the {} down on the {}", "carry the {} to the {}",
             "move the {} into the {}", "drop the {} in the {}", "stack the {} on top of the {}",
             "push the {} over to the {}")  # fmt: skip
SHARES = {"fr3": 0.85, "sixaxis": 0.05, "gripper": 0.05, "hands": 0.05}  # of the scenes


@dataclass
class Still:
    """image: uint8 (H, H, 3). things: what is seen, and its box (top, left, bottom, right) in shares of the image.
    owner: int8 (H, H), the number of the thing that a pixel belongs to, or -1. camera: its name. view: its position
    (3,) and axes (3, 3) (right, up, back) in the base frame, and the tangent of half its field of view. home: whether
    the scene is."""

    image: np.ndarray
    things: list[tuple[str, tuple[float, float, float, float]]]
    owner: np.ndarray
    camera: str = ""
    view: tuple = ()
    home: bool = False


def household(s: Scene, body, kind: str, rgba: tuple) -> tuple[float, float]:
    """Adds the primitives of a household thing of this colour to a body. Returns the height of its origin above the
    table, and its radius, in metres. A primitive with a name is a thing of its own: the sauce of a bowl."""
    u = s.rng.uniform

    def add(geom, size, at=(0, 0, 0), colour=rgba, yaw=0.0, name=""):
        return add_geom(body, geom, size, at, colour, 0.1, yaw, visual=True, name=name)

    if kind in ("cup", "mug", "pot"):
        r, half = (u(0.04, 0.07), u(0.02, 0.045)) if kind == "pot" else (u(0.024, 0.042), u(0.028, 0.058))
        add("cylinder", (r, half))
        add("cylinder", (u(0.75, 0.95) * r, 0.001), (0, 0, half), tint(s.rng, 0.0, 0.35))
        long, wide = u(0.012, 0.026), u(0.004, 0.009)
        if kind == "pot":
            grip, up = tint(s.rng, 0.0, 0.5), u(0, 0.7) * half
            for side in (-1, 1):
                add("box", (long, 0.5 * r, wide), (side * (r + long), 0, up), grip)
        if kind == "mug":
            add("box", (0.004, wide, 0.5 * half), (r + long, 0, 0))
            for side in (-1, 1):
                add("box", (long / 2, wide, 0.004), (r + long / 2, 0, 0.5 * side * half))
        return half, r + 0.02
    if kind in ("oven", "cabinet"):  # open towards the robot, the door hinged below or at one side
        depth, width, height, w = u(0.05, 0.11), u(0.07, 0.15), u(0.05, 0.1), u(0.004, 0.008)
        for side in (-1, 1):
            add("box", (depth, width, w), (0, 0, side * (height - w)))
            add("box", (depth, w, height), (0, side * (width - w), 0))
        add("box", (w, width, height), (depth, 0, 0), tint(s.rng, 0.1, 0.4))
        angle, span = u(0.0, 1.6), height if kind == "oven" else width
        out, along = depth + np.sin(angle) * span, (np.cos(angle) - 1) * span
        door = add("box", (w, width, height), (-out, *((0, along) if kind == "oven" else (along, 0))), tint(s.rng))
        turn = np.array([0, -1, 0] if kind == "oven" else [0, 0, 1]) * np.sin(angle / 2)
        door.quat = (np.cos(angle / 2), *turn)
        return height, float(np.hypot(depth, width))
    if kind == "brush":  # lies; its origin is the middle of the handle
        long, thick, head = u(0.05, 0.085), u(0.006, 0.011), (u(0.012, 0.025), u(0.01, 0.018), u(0.006, 0.011))
        add("box", (long, thick, thick))
        add(str(s.rng.choice(["box", "ellipsoid"])), head, (long + 0.8 * head[0], 0, 0), tint(s.rng))
        return thick, long + head[0]
    if kind == "bowl":
        r, wall, sides = u(0.036, 0.065), u(0.01, 0.022), int(s.rng.integers(8, 15))
        add("cylinder", (r, 0.003), (0, 0, 0.003))
        for angle in 2 * np.pi / sides * np.arange(sides):
            at, pane = (r * np.cos(angle), r * np.sin(angle), wall), r * np.tan(np.pi / sides) + 0.002
            add("box", (0.004, pane, wall), at, rgba, angle)
        if s.rng.random() < 0.7:
            _, words, of_sauce = s.paint(("sauce",))
            add("cylinder", (0.97 * r, 0.001), (0, 0, u(0.4, 1.3) * wall), of_sauce, name=words)
            s.family.parts.append(words)
        return 0.0, r
    if kind == "slot":  # a board with a hole
        x, y, w, z = u(0.02, 0.04), u(0.014, 0.03), u(0.01, 0.026), u(0.008, 0.022)
        for side in (-1, 1):
            add("box", (w, y + 2 * w, z), (side * (x + w), 0, z))
            add("box", (x, w, z), (0, side * (y + w), z))
        add("box", (x, y, 0.0005), (0, 0, 0.0005), tint(s.rng, 0.0, 0.3))
        return 0.0, float(np.hypot(x, y)) + w
    assert kind == "block", kind
    x, y, z = u(0.018, 0.034), u(0.012, 0.024), u(0.016, 0.04)
    add("box", (x, y, z))
    return z, float(np.hypot(x, y))


class Nothing(Family):
    """No behaviour: one or two things, up to four household ones, up to two that stand fast, and bystanders.

    household: what touches nothing, and waits under the table until it is put somewhere. parts: the names of primitives
    that are things of their own."""

    name = "nothing"

    def build(self, s: Scene) -> None:
        rng, self.standing = self.rng, {}
        for name in ("first", "second")[: rng.integers(0, 3)]:
            half, height = rng.uniform(0.04, 0.07), rng.uniform(0.02, 0.06)
            if rng.random() < 0.4:
                self.standing[name], _ = s.tray(name, ("tray", "box", "basket"), half, height)
                continue
            body, words, rgba, _, _ = s.fixed(name, ("plate", "platform"), 1.4 * half, turn=np.pi)
            if words.endswith("plate"):
                add_geom(body, "cylinder", (half, 0.003), (0, 0, 0.003), rgba)
            else:
                add_geom(body, "box", (half, rng.uniform(0.03, 0.07), height / 2), (0, 0, height / 2), rgba)
            self.standing[name] = words
        for _ in range(rng.integers(1, 3)):
            s.thing(GRASPABLE)
        self.household, self.parts, large = {}, [], 0
        for k in range(rng.integers(0, 5)):
            kind, words, rgba = s.paint(HOUSEHOLD if not large else [h for h in HOUSEHOLD if h not in LARGE])
            large += kind in LARGE
            body = add_free(s.root, f"household{k}")
            body.pos = (0, 0, -1)
            half, radius = household(s, body, kind, rgba)
            self.household[body.name] = Thing(body.name, words, half, radius, np.zeros(2), 0.0, 0.0)


def stills(seed: int, number: int, size: int) -> list[Still]:
    """The PER_SCENE stills, of size x size pixels, of scene `number`: a function of the arguments."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 77, number]))
    body = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    while True:
        with contextlib.suppress(Crowded):
            scene = Scene(body, Nothing, rng)
            break
    cameras = ("primary",) if body == "hands" else ("primary", "wrist")
    eyes = _eyes_of(scene, cameras, size)
    words, owner = _owners(scene)
    made = []
    for _ in range(PER_SCENE // len(cameras)):
        _arrange(scene, rng)
        made += look(scene, eyes, words, owner)
    scene.limbs.clear()  # they know their scene: as a circle it would wait, with all its meshes, for the collector
    return made


def _owners(scene: Scene) -> tuple[list[str], np.ndarray]:
    """What has a name in a scene, and for each geom of the model the number of the name that it belongs to, or -1."""
    things, family = scene.things | scene.family.household, scene.family
    names = {name: thing.words for name, thing in things.items()} | family.standing | {p: p for p in family.parts}
    grips = {"left": "left hand", "right": "right hand"} if scene.body == "hands" else {"": "gripper"}
    model, owner = scene.model, []
    for geom, body in enumerate(model.geom_bodyid):
        name, root = model.body(body).name, model.body(model.body_rootid[body]).name
        if (part := model.geom(geom).name) in family.parts:
            owner.append(list(names).index(part))
        elif root in names:
            owner.append(list(names).index(root))
        elif name.endswith(("finger", "palm", "hand")):
            owner.append(len(names) + next(k for k, side in enumerate(grips) if name.startswith(side)))
        else:
            owner.append(-1)
    return [*names.values(), *grips.values()], np.array(owner)


def _arrange(scene: Scene, rng: np.random.Generator) -> None:
    """Puts the free things and the limbs elsewhere, at random: now and then the one right above the other. What
    finds no room is out of sight."""
    model, qpos = scene.model, scene.data.qpos
    movable = sorted([*scene.family.household.values(), *scene.things.values()], key=lambda thing: -thing.radius)
    taken = [(at, r) for at, r in scene.taken if not any(np.array_equal(at, t.at) for t in scene.things.values())]
    address = lambda thing: model.jnt_qposadr[model.body(thing.name).jntadr[0]]
    for thing in movable:
        large = thing.words.endswith(LARGE)
        apart = lambda at, thing=thing: all(np.linalg.norm(at - o) > thing.radius + r + 0.01 for o, r in taken)
        spots = rng.uniform(LOW, HIGH, (20, 2)) + (0.1 * large, 0)
        at, yaw = next(filter(apart, spots), None), rng.uniform(-np.pi, np.pi) * (0.2 if large else 1)
        if at is not None:
            taken.append((at, thing.radius))
        pose = (0, 0, -1) if at is None else (*at, thing.half)
        qpos[address(thing) :][:7] = (*pose, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
    for limb in scene.limbs.values():
        out = {"left": 0.14, "right": -0.14}[limb.side] if len(scene.limbs) > 1 else 0.0
        at = rng.uniform((0.33, -0.3, 0.0), (0.68, 0.3, 0.32)) + (0, out, 0)
        if rng.random() < 0.35 and movable:
            thing = movable[rng.integers(len(movable))]
            off = (*rng.normal(0, 0.04, 2), 0.01 + rng.exponential(0.07))
            at = qpos[address(thing) :][:3] + off
        limb.start(at, pointing_down(rng.uniform(-1.2, 1.2)))
        limb.begin()
        if not limb.tips:
            qpos[limb.fingers] *= rng.uniform(0, 1)
    scene.mj.mj_kinematics(model, scene.data)
    scene.mj.mj_camlight(model, scene.data)


_eyes: dict[tuple[int, int], Cameras] = {}  # of this process: a GL context takes longer than a scene


def _eyes_of(scene: Scene, cameras: tuple[str, ...], size: int) -> Cameras:
    key = size, len(cameras)
    if key not in _eyes:
        _eyes[key] = Cameras(scene.model, cameras, size)
    _eyes[key].watch(scene.model, cameras)
    return _eyes[key]


def look(scene: World, eyes: Cameras, words: list[str], owner: np.ndarray) -> list[Still]:
    """A still from each camera, of the scene as it is now. owner: for each geom the number of its name, or -1."""
    flags, kinds = scene.mj.mjtRndFlag, scene.mj.mjtObj
    images = eyes.render(scene.data)
    eyes.scene.flags[flags.mjRND_SEGMENT] = eyes.scene.flags[flags.mjRND_IDCOLOR] = 1  # colours are numbers of geoms
    painted = eyes.render(scene.data)
    eyes.scene.flags[flags.mjRND_SEGMENT] = eyes.scene.flags[flags.mjRND_IDCOLOR] = 0
    drawn = eyes.scene.geoms[: eyes.scene.ngeom]
    numbers = np.array([-1, *(owner[g.objid] if g.objtype == kinds.mjOBJ_GEOM else -1 for g in drawn)])
    made = []
    for camera, image in images.items():
        seen, things = numbers[painted[camera].astype(np.int64) @ (1, 256, 65536)], []
        of_pixel = np.full(seen.shape, -1, np.int8)
        for k, name in enumerate(words):
            rows, columns = np.nonzero(seen == k)
            if len(rows) >= SMALLEST * seen.size:
                box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                of_pixel[seen == k] = len(things)
                things.append((name, tuple(float(edge) / len(image) for edge in box)))
        now, angle = scene.data.camera(camera), scene.model.camera(camera).fovy[0]
        view = now.xpos.copy(), now.xmat.reshape(3, 3).copy(), float(np.tan(np.radians(angle) / 2))
        made.append(Still(image, things, of_pixel, camera, view, getattr(scene, "home", False)))
    return made


def kind_of_question(rng: np.random.Generator, refer: float) -> str:
    """One of KINDS: `refer` is that kind's share, the other two share the rest."""
    if refer and rng.random() < refer:
        return "refer"
    return "detect" if rng.random() < 0.5 else "describe"


def ask(still: Still, rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """A question about a still, and the answer.

    detect      some names                            each with its place
    describe    nothing but "describe"                all that is there with its place, from left to right
    refer       "detect" and what one could say to    the names in it with their places, as phrases are grounded in
                a robot of one thing or two           images; not with the verbs of the five tasks' instructions"""
    place = lambda box: "".join(map(common.loc, box))
    if not still.things:
        return ("describe" if kind == "describe" else "detect gripper"), "nothing"
    things = [(name, box) for name, box in still.things if kind != "refer" or not name.endswith(("gripper", "hand"))]
    if not things:
        return ask(still, rng, "detect")
    if kind == "describe":
        question, asked = "describe", sorted(things, key=lambda thing: thing[1][1])
    else:
        every, nouns = [name.split()[-1] for name, _ in still.things], [name.split()[-1] for name, _ in things]
        brief = [noun if every.count(noun) == 1 and rng.random() < PLAIN else "" for noun in nouns]
        asked = [(brief[i] or things[i][0], things[i][1]) for i in rng.permutation(len(things))]
        if kind == "detect":
            asked = asked[: rng.integers(1, ASKED + 1)]
            question = " ; ".join(name for name, _ in asked)
        else:
            sentence = str(rng.choice([s for s in SENTENCES if s.count("{}") <= len(asked)]))
            asked = asked[: sentence.count("{}")]
            question = sentence.format(*(name for name, _ in asked))
        question = f"detect {question}"
    return question, " ; ".join(f"{name} {place(box)}" for name, box in asked)


def sheet(path: Path, seed: int = 0, size: int = 96, scale: int = 2, columns: int = 8, rows: int = 3) -> None:
    """Draws stills with the boxes of what they show."""
    from PIL import Image, ImageDraw

    page, each = Image.new("RGB", (columns * size * scale, rows * size * scale)), size * scale
    for k in range(columns * rows):
        still = stills(seed, k, size)[k % PER_SCENE]
        image = Image.fromarray(still.image).resize((each, each))
        draw = ImageDraw.Draw(image)
        for name, box in still.things:
            top, left, bottom, right = (edge * each for edge in box)
            draw.rectangle((left, top, right, bottom), outline="red")
            draw.text((left + 2, top - 11 if top > 11 else top), name, "black")
        page.paste(image, (k % columns * each, k // columns * each))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)
    print(f"wrote {path}")


@dataclass
class Args:
    sheet: str = "docs/stills.png"
    """The PNG to draw."""
    seed: int = 0
    """Seed of the scenes."""


def main() -> None:
    args = common.parse_args(Args, {}, __doc__)
    if Path(args.sheet).suffix != ".png":
        raise InputError(f"--sheet {args.sheet}: give a file that ends in .png")
    sheet(Path(args.sheet), args.seed)


if __name__ == "__main__":
    common.run_main(main, resumes=False)
