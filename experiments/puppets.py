"""Jointed figures: how they move in ten actions, and how they are drawn before a textured, shaking background.

After Johansson's walkers. What a film shows follows from the random generators given; walkers.py makes sets of them.
"""

import cv2
import numpy as np

# Seconds that one period lasts before the clip's own speed (x 0.77 to 1.3) is applied.
PERIODS = {"Walk": 0.72, "Run": 0.64, "Jump": 0.60, "WaveOne": 0.54, "WaveBoth": 0.56, "JumpingJack": 0.84,
           "Bend": 0.80, "Kick": 0.74, "Turn": 1.05, "Squat": 0.74}
ACTIONS = tuple(PERIODS)

# ---------------------------------------------------------------------------------------------------------------------
# Motion: angles of the joints over time
# ---------------------------------------------------------------------------------------------------------------------
# A limb has four angles in degrees: (forward, outward) of its upper part, then of its lower part. Zero hangs down.
# A pose over T frames: arms, legs [2, T, 4] (left, right); body [T, 4]: pitch and roll of the trunk, hop (in body
# heights), heading.
RESTING_ARMS = np.array([
    (5, 8, 15, 6), (-20, 45, 0, -45), (0, 85, 0, 85), (80, 10, 90, 5), (0, 160, 0, 172), (0, 90, 0, 165),
    (30, 15, 80, -45), (-35, 10, -25, 8)], dtype=float)
RESTING_LEGS = np.array([
    [(0, 3, 0, 3), (0, 3, 0, 3)], [(0, 18, 0, 18), (0, 18, 0, 18)], [(26, 4, 22, 4), (-18, 4, -34, 4)],
    [(40, 8, -30, 8), (40, 8, -30, 8)], [(65, 6, -15, 6), (0, 3, 0, 3)]], dtype=float)


def rest(t, rng):
    """A posture drawn at random, held with a little sway at the times t (seconds) -> arms, legs, body."""
    arms = RESTING_ARMS[rng.integers(len(RESTING_ARMS), size=2)] + rng.normal(0, 8, (2, 4))
    legs = RESTING_LEGS[rng.integers(len(RESTING_LEGS))][:: rng.choice([-1, 1])] + rng.normal(0, 3, (2, 4))
    body = np.array([rng.uniform(-5, 25), rng.normal(0, 5), 0, rng.uniform(25, 60) + 90 * rng.integers(4)])
    sway = rng.uniform(0, 3, 20) * np.sin(2 * np.pi * (t[:, None] / rng.uniform(0.8, 1.6, 20) + rng.random(20)))
    pose = np.concatenate([arms.ravel(), legs.ravel(), body]) + sway * (np.arange(20) != 18)
    arms, legs = np.moveaxis(pose[:, :16].reshape(-1, 2, 2, 4), 0, 2)
    return arms.copy(), legs.copy(), pose[:, 16:].copy()


def move(action, cycle, strength, side, sign, arms, legs, body):
    """Let a resting figure perform `action`, in place.

    cycle [T]: periods passed. strength: factor on the angles, near 1. side: the limb that acts, 0 or 1. sign: -1 or 1,
    which way it turns, or whether two waving arms go together. arms, legs, body: as above.
    """
    turn = 2 * np.pi * cycle
    up = (1 - np.cos(turn)) / 2 * strength  # 0 at rest, 1 at the peak of the action
    if action in ("Walk", "Run"):
        stride, bend, lift = (28, 8, 48) if action == "Walk" else (38, 25, 85)
        for s in (0, 1):
            swing = stride * strength * np.sin(turn + np.pi * s)
            knee = bend + lift * np.maximum(0, np.cos(turn + np.pi * s))  # bent while the leg comes forward
            legs[s, :, 0], legs[s, :, 2] = swing, swing - knee
            legs[s, :, 1::2] = 3
            arms[s, :, ::2] -= 0.9 * swing[:, None]
        if action == "Run":
            body[:, 0] += 8
            body[:, 2] = 0.05 * np.abs(np.sin(turn + 0.6))
    elif action in ("Jump", "Squat"):
        if action == "Jump":  # 0.45 of the period on the ground, then a parabola
            part = cycle % 1
            air = np.clip((part - 0.45) / 0.55, 0, 1)
            down = np.where(part < 0.45, np.sin(np.pi * np.minimum(part / 0.45, 1)), 0) * 0.6 * strength
            body[:, 2] = 0.13 * strength * 4 * air * (1 - air)
            arms[:, :, ::2] += (20 * (body[:, 2] / 0.13 - down))[:, None]
        else:
            down = up
        body[:, 0] += 25 * down
        legs[:] = np.stack([80 * down, 6 + 0 * down, -62 * down, 6 + 0 * down], axis=-1)
    elif action in ("WaveOne", "WaveBoth"):
        for s in (side,) if action == "WaveOne" else (0, 1):
            swing = strength * np.sin(turn) * (sign if s != side else 1)
            arms[s] = np.stack([0 * turn, 100 + 14 * swing, 0 * turn, 160 + 48 * swing], axis=-1)
    elif action == "JumpingJack":
        arms[:] = np.stack([0 * up, 15 + 140 * up, 5 + 0 * up, 18 + 147 * up], axis=-1)
        legs[:] = np.stack([0 * up, 3 + 26 * up, 0 * up, 3 + 26 * up], axis=-1)
        body[:, 2] = 0.06 * np.sin(turn) ** 2
    elif action == "Bend":
        body[:, 0] += 75 * up
    elif action == "Kick":
        thigh = -22 + 95 * up
        knee = 10 + 200 * np.maximum(0, up * (1 - up))
        legs[side] = np.stack([thigh, 4 + 0 * up, thigh - knee, 4 + 0 * up], axis=-1)
        legs[1 - side] = (-3, 3, -6, 3)
        body[:, 0] -= 12 * up
    elif action == "Turn":
        body[:, 3] += sign * 360 * cycle


def joints(arms, legs, body, build):
    """Place the joints: pose over T frames -> {name: [T, 3]} in body heights, (forward, left, up), feet on the ground.

    build: lengths as `subject` draws them.
    """
    def along(angles, s):  # a unit vector of a limb; the left side is +
        f, o = np.radians(angles[..., 0]), np.radians(angles[..., 1])
        return np.stack([np.sin(f) * np.cos(o), (1 - 2 * s) * np.sin(o), -np.cos(f) * np.cos(o)], axis=-1)

    pitch, roll = np.radians(body[:, 0]), np.radians(body[:, 1])
    zero, one = 0 * pitch, 1 + 0 * pitch
    c, s = np.cos(pitch), np.sin(pitch)
    about_left = np.stack([c, zero, s, zero, one, zero, -s, zero, c], axis=-1)
    c, s = np.cos(roll), np.sin(roll)
    about_front = np.stack([one, zero, zero, zero, c, s, zero, -s, c], axis=-1)
    trunk = about_left.reshape(-1, 3, 3) @ about_front.reshape(-1, 3, 3)  # [T, 3, 3]: moves all above the hips

    def above(v):
        return (trunk @ np.broadcast_to(v, (len(pitch), 3))[..., None])[..., 0]

    p = {"pelvis": np.zeros((len(pitch), 3))}
    p["neck"] = above((0, 0, build["trunk"]))
    p["head"] = p["neck"] + above((0.02, 0, build["head"] + 0.03))
    p["face"] = p["head"] + above((0.6 * build["head"], 0, 0))
    for s in (0, 1):
        p[f"shoulder{s}"] = p["neck"] + above((0, (1 - 2 * s) * build["shoulders"], -0.02))
        p[f"elbow{s}"] = p[f"shoulder{s}"] + build["arm"] * above(along(arms[s, :, :2], s))
        p[f"hand{s}"] = p[f"elbow{s}"] + build["arm"] * above(along(arms[s, :, 2:], s))
        p[f"hip{s}"] = p["pelvis"] + np.array([0, (1 - 2 * s) * build["hips"], 0])
        p[f"knee{s}"] = p[f"hip{s}"] + build["leg"] * along(legs[s, :, :2], s)
        p[f"ankle{s}"] = p[f"knee{s}"] + build["leg"] * along(legs[s, :, 2:], s)
        p[f"toe{s}"] = p[f"ankle{s}"] + along(legs[s, :, 2:] + np.array([80, 0]), s) * 0.08
    ground = np.minimum(p["ankle0"][:, 2], p["ankle1"][:, 2]) - body[:, 2]
    return {name: q - ground[:, None] * (0, 0, 1) for name, q in p.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Appearance: drawn without knowing the action
# ---------------------------------------------------------------------------------------------------------------------
def colour(rng):
    """A strong colour, BGR."""
    hsv = np.uint8([[[rng.integers(180), rng.integers(60, 256), rng.integers(50, 256)]]])
    return tuple(map(int, cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]))


def subject(rng):
    """Body and clothes of one person -> dict of lengths in body heights, and for each part its colour."""
    build = {"trunk": rng.uniform(0.28, 0.33), "head": rng.uniform(0.07, 0.095), "shoulders": rng.uniform(0.09, 0.13),
             "hips": rng.uniform(0.05, 0.08), "arm": rng.uniform(0.165, 0.195), "leg": rng.uniform(0.22, 0.25),
             "thick": rng.uniform(1.3, 2.0), "outline": [(15, 15, 15), (240, 240, 240)][rng.integers(2)]}
    for part in ("head", "face", "trunk", "arm", "hand", "leg", "foot"):
        build["wear_" + part] = colour(rng)
    return build


def background(side, rng):
    """A texture [side, side, 3] uint8: coloured noise at three scales."""
    noise = np.zeros((side, side, 3), np.float32)
    for cells, weight in ((4, 1.0), (10, 0.7), (26, 0.5)):
        coarse = rng.normal(0, weight, (cells, cells, 3)).astype(np.float32)
        noise += cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(noise / noise.std() * rng.uniform(12, 30) + rng.uniform(70, 185, 3), 0, 255).astype(np.uint8)


def camera(t, rng):
    """Camera paths at the times t (seconds) -> shake [T, 2] and drift [T, 2] in 1/64 of a frame, roll [T] in degrees.

    The drift moves the background alone: the camera follows the figure through its surroundings.
    """
    def waves(speed, shortest, longest, n):  # sums of n sines with a root-mean-square speed per second
        periods = rng.uniform(shortest, longest, (n, 2))
        size = speed * np.sqrt(2 / n) * periods / (2 * np.pi)
        return (size * np.sin(2 * np.pi * (t[:, None, None] / periods + rng.random((n, 2))))).sum(1)

    shake = waves(rng.uniform(1.2, 3), 0.2, 0.6, 4)
    drift = waves(rng.uniform(0, 2.4), 1.5, 3.0, 1)
    return shake, drift, waves(rng.uniform(0, 1.2), 0.3, 0.9, 2)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------------
def limb(a, b, ra, rb, edge):
    """The outlines of a limb over T frames, a rim's and its own, in 1/16 px.

    a, b: its ends [T, 2] px. ra, rb: its radii there. edge: width of the rim.
    Returns two layers (ra, rb, corners [T, 4, 2]).
    """
    axis = b - a
    across = axis[:, ::-1] * (-1, 1) / np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), 1e-6)
    layers = []
    for ra_, rb_ in ((ra + edge, rb + edge), (ra, rb)):
        corners = np.stack([a - ra_ * across, a + ra_ * across, b + rb_ * across, b - rb_ * across], axis=1)
        layers.append((ra_, rb_, np.rint(16 * corners).astype(np.int32)))
    return layers


def draw(image, a, b, layers, paints, i):
    """Draw frame i of a limb from a to b [T, 2], px, in the colours of the rim and of the limb."""
    a, b = (tuple(np.rint(16 * p[i]).astype(int).tolist()) for p in (a, b))
    for (ra, rb, corners), paint in zip(layers, paints, strict=True):
        cv2.circle(image, a, round(16 * ra), paint, -1, cv2.LINE_8, 4)
        cv2.circle(image, b, round(16 * rb), paint, -1, cv2.LINE_8, 4)
        cv2.fillConvexPoly(image, corners[i], paint, cv2.LINE_8, 4)


def render(action, size, frames, fps, person, rng):
    """Render one clip -> list of `frames` uint8 [size, size, 3], BGR.

    person: what `subject` draws. rng: the clip's own; it draws the same things in the same order for every action.
    """
    t = np.arange(frames) / fps
    canvas = size * max(2, round(192 / size))  # drawn large and averaged down, for smooth edges and sub-pixel motion
    unit = canvas / 64
    cycle = rng.random() + t / (PERIODS[action] * np.exp(rng.uniform(-0.26, 0.26)))
    strength, side, sign = rng.uniform(0.85, 1.1), rng.integers(2), rng.choice([-1, 1])
    height, elevation = rng.uniform(0.78, 0.88) * canvas, np.radians(rng.uniform(0, 12))
    foot = np.array([0.5 + rng.uniform(-0.14, 0.14), rng.uniform(0.89, 0.95)]) * canvas
    shake, drift, roll = camera(t, rng)
    pose = rest(t, rng)
    texture = background(canvas * 8 // 5, rng)
    move(action, cycle, strength, side, sign, *pose)

    yaw = np.radians(pose[2][:, 3])
    flat, depth = {}, {}
    c, s, centre = np.cos(np.radians(roll)), np.sin(np.radians(roll)), canvas / 2
    for name, q in joints(*pose, person).items():
        x = q[:, 0] * np.sin(yaw) + q[:, 1] * np.cos(yaw)
        depth[name] = q[:, 0] * np.cos(yaw) - q[:, 1] * np.sin(yaw)
        y = -q[:, 2] * np.cos(elevation) + depth[name] * np.sin(elevation)
        x, y = foot[0] + height * x - centre, foot[1] + height * y - centre
        flat[name] = np.stack([c * x - s * y, s * x + c * y], -1) + centre + shake * unit  # [T, 2] px of the canvas
    thick, head = person["thick"], person["head"] / person["thick"]  # a head doesn't grow with the limbs
    parts = [("pelvis", "neck", 0.070, 0.080, "trunk"), ("shoulder0", "shoulder1", 0.036, 0.036, "trunk"),
             ("hip0", "hip1", 0.046, 0.046, "leg"), ("head", "head", head, head, "head"),
             ("face", "face", 0.6 * head, 0.6 * head, "face")]
    for k in "01":
        parts += [(f"hip{k}", f"knee{k}", 0.048, 0.036, "leg"), (f"knee{k}", f"ankle{k}", 0.036, 0.026, "leg"),
                  (f"ankle{k}", f"toe{k}", 0.026, 0.022, "foot"), (f"shoulder{k}", f"elbow{k}", 0.034, 0.028, "arm"),
                  (f"elbow{k}", f"hand{k}", 0.028, 0.022, "hand")]
    limbs = []  # (depth [T], end [T, 2], end [T, 2], layers, colours)
    for a, b, ra, rb, part in parts:
        layers = limb(flat[a], flat[b], ra * thick * height, rb * thick * height, 0.012 * height)
        paints = (person["outline"], person["wear_" + part])
        limbs.append((depth[a] + depth[b], flat[a], flat[b], layers, paints))

    film = []
    for i in range(frames):
        turn = cv2.getRotationMatrix2D((texture.shape[1] / 2, texture.shape[0] / 2), -roll[i], 1.0)
        turn[:, 2] += (shake[i] + drift[i]) * unit - (np.array(texture.shape[1::-1]) - canvas) / 2
        image = cv2.warpAffine(texture, turn, (canvas, canvas), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for _, a, b, layers, paints in sorted(limbs, key=lambda x: x[0][i]):  # the nearest last
            draw(image, a, b, layers, paints, i)
        film.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    return film
