"""Pairs of frames whose motion is known, and how near OpenCV's flow ours is to be."""

import cv2
import numpy as np


def texture(h, w, seed=0, sigma=2):
    noise = np.random.default_rng(seed).normal(size=(h, w)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), sigma), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def moved(h, w, matrix, seed=0):
    """Two frames [2, h, w]; `matrix` [2, 3] takes a point of the first, from the centre, to its place in the second."""
    big, room = texture(h + 80, w + 80, seed), np.array([w / 2 + 40, h / 2 + 40])
    linear = np.float64(matrix)[:, :2]
    whole = np.c_[linear, np.float64(matrix)[:, 2] + room - linear @ room]
    second = cv2.warpAffine(big, whole, (w + 80, h + 80), flags=cv2.INTER_CUBIC)
    return np.stack([big, second])[:, 40:-40, 40:-40].copy()


TURN = np.deg2rad(2)
MOTIONS = {"right": [[1, 0, 2.5], [0, 1, 0]], "up": [[1, 0, 0], [0, 1, -3]], "far": [[1, 0, 5], [0, 1, 3]],
           "turn": [[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0]],
           "zoom in": [[1.04, 0, 0], [0, 1.04, 0]], "zoom out": [[0.96, 0, 1], [0, 0.96, 0]]}
FIVE = int(cv2.__version__.split(".")[0]) >= 5
LIKE, SAME = (0.02, 1e-3) if FIVE else (0.06, 0.06)  # px on average; of small pictures, where borders count for much
