"""Folders of images as videos: 00001.jpg, 00002.jpg, ... in order of the number in their names.

What other projects extract: Jester and Something-Something V1, mmaction2's rawframes (whose flow_x_ and flow_y_ images
are passed over), CoCLR's frames. Their rate is not known; 25 a second is taken.
"""

import itertools
import math
import os
import re
from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

from support.errors import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
NO_FRAMES = {"thumbs.db", "desktop.ini"}  # what systems put beside images
FLOW_IMAGES = re.compile(r"(flow_)?[xyuv]_\d+$", re.IGNORECASE)  # denseflow, TSN
RATE = 25


def is_frame_folder(folders, files):
    """Whether a folder that holds these names is a video: images, no other file, no folder."""
    shown = [f for f in files if not f.startswith(".") and f.lower() not in NO_FRAMES]
    return (bool(shown) and not any(not f.startswith(".") for f in folders)
            and all(os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES for f in shown))


class Frames(NamedTuple):
    """The images of a folder: paths in order, and the place of each, 0, 1, 2, ... with holes where images lack."""
    paths: list
    places: list


def list_frames(path):
    """The folder `path` -> Frames. Raises BadInput where the order of its images doesn't follow from their names."""
    series = defaultdict(dict)  # name with its number left out -> {number: file}
    try:
        files = sorted(os.listdir(path))
    except OSError as e:
        raise BadInput(f"{path} can't be read ({e.strerror})") from e
    for file in files:
        stem, suffix = os.path.splitext(file)
        if file.startswith(".") or suffix.lower() not in IMAGE_SUFFIXES or FLOW_IMAGES.match(stem):
            continue
        number = re.search(r"(\d+)(\D*)$", stem)
        if not number:
            raise BadInput(f"{path}/{file} has no number in its name; a folder of images is a video whose frames are "
                           f"numbered: number them, or keep them elsewhere")
        own = series[stem[:number.start()].lower(), number[2].lower()]
        if (before := own.get(int(number[1]))) is not None:
            raise BadInput(f"{path} holds {before} and {file}, both frame {int(number[1])}; remove one")
        own[int(number[1])] = file
    if not series:
        raise BadInput(f"{path} holds no frame")
    if len(series) > 1:
        shown = ", ".join(next(iter(own.values())) for own in list(series.values())[:4])
        raise BadInput(f"{path} holds {len(series)} series of images ({shown}); give each a folder of its own")
    (own,) = series.values()
    numbers = sorted(own)
    step = math.gcd(*(b - a for a, b in itertools.pairwise(numbers))) or 1
    return Frames([os.path.join(path, own[n]) for n in numbers], [(n - numbers[0]) // step for n in numbers])


def read_image(path):
    """An image file -> uint8 [H, W, 3] BGR. Raises BadInput where it can't be read."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with open(path, "rb") as f:  # of any name; cv2.imread wants UTF-8
            image = cv2.imdecode(np.frombuffer(f.read(), np.uint8), cv2.IMREAD_COLOR)
    except OSError as e:
        raise BadInput(f"{path} can't be read ({e.strerror})") from e
    except cv2.error:  # an empty file, or a size beyond all measure
        image = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise BadInput(f"{path} is no image that OpenCV can decode; remove it, or write it again")
    return image


def read_frames(path, wanted=None):
    """Yield (t, uint8 [H, W, 3] BGR) for the frames `wanted` (ascending; None: all) of a folder, as far as there are.

    Raises BadInput, naming the image, where one can't be read or is of another size than the first one read.
    """
    paths, shape, first = list_frames(path).paths, None, None
    for t in range(len(paths)) if wanted is None else wanted:
        if t >= len(paths):
            break
        image = read_image(paths[t])
        if shape is None:
            shape, first = image.shape, paths[t]
        elif image.shape != shape:
            raise BadInput(f"{paths[t]} is {image.shape[1]}x{image.shape[0]}, but {first} is {shape[1]}x{shape[0]}; "
                           f"the frames of a video have one size")
        yield t, image


def gaps(path):
    """A message if numbers are missing between the first and the last image of a folder, else None."""
    paths, places = list_frames(path)
    lacking = places[-1] + 1 - len(places)
    if not lacking:
        return None
    before = next(paths[k] for k in range(len(places) - 1) if places[k + 1] != places[k] + 1)
    return (f"{path} has gaps: {lacking} of {places[-1] + 1} frames are missing, the first after "
            f"{os.path.basename(before)}")


def times(path):
    """Times of the frames of a folder in seconds, and the duration of the last: 25 a second, gaps left open."""
    return [Fraction(place, RATE) for place in list_frames(path).places], Fraction(1, RATE)


def folder_stat(path):
    """(bytes of all files, ns of the newest change) of a folder of images."""
    with os.scandir(path) as entries:
        stats = [e.stat() for e in entries if e.is_file()]
    return sum(s.st_size for s in stats), max([os.stat(path).st_mtime_ns, *(s.st_mtime_ns for s in stats)])
