"""Frames of a film with their flow, from the stores or decoded, and what becomes of a file that can't be read."""

import cv2

from support.errors import BadInput
from support.videos import FilmReader, declared_frames, file_stat, frames_at

READ_ERRORS = (BadInput, OSError, cv2.error)  # what a file may do to its reader


def error_message(video, error):
    """One message that names the file."""
    return str(error) if isinstance(error, BadInput) else f"{video.path} failed: {' '.join(str(error).split())}"


def open_views(video, store, rgb=None):
    """The stores' files of a video -> (AviReader of its flow, AviReader of its RGB), each None without such a store.

    Raises BadInput, naming the file, if one is missing or damaged, or the two are not of the same film.
    """
    flow = store.open(video.name) if store else None
    frames = rgb.open(video.name) if rgb else None
    if flow is None or frames is None:
        return flow, frames
    size, size_then = (reader.header.get("source_bytes") for reader in (frames, flow))
    if (len(frames), size) != (len(flow) + 1, size_then):
        raise BadInput(f"{frames.path} holds {len(frames)} frames of a video of {size} bytes, but {flow.path} is the "
                       f"flow of {len(flow) + 1} frames of one of {size_then} bytes; remove both and run again: "
                       f"{frames.command}")
    return flow, frames


class EndsEarly(BadInput):
    """A film of `frames` frames, fewer than it declares."""

    def __init__(self, path, frames):
        super().__init__(f"{path} ends at frame {frames}, before it should" if frames else
                         f"{path} holds no frame that OpenCV can decode; is it a video?")
        self.frames = frames


def read_frames(video, flow, wanted, rgb=None, reader=None, views=("rgb", "flow"), first=0):
    """Yield (t, frame uint8 [H, W, 3] in BGR order, flow uint8 [2h, w], u over v) for each t of `wanted`
    (ascending), in one pass.

    flow, rgb: of `open_views`; without rgb the video is decoded, by `reader`, a FilmReader, if one is given. views: of
    one view the other is None, and no file of it is read. first: the frame of `reader`'s film that flow's frame 0 is.
    Raises BadInput, naming the file, if one can't be read, the video ends before its flow, or is another one, longer
    than its flow; of RGB alone EndsEarly, where it ends before a wanted frame.
    """
    if "rgb" not in views:
        yield from ((t, None, planes) for t, planes in zip(wanted, flow.frames(wanted), strict=True))
        return
    if "flow" not in views:
        reader, last = reader or (None if rgb else FilmReader(video.path)), None
        for last, frame in zip(wanted, rgb.frames(wanted), strict=True) if rgb else reader.frames_at(wanted):
            yield last, frame, None
        if last != wanted[-1]:
            raise EndsEarly(video.path, reader.position)
        return
    if rgb is not None:
        source = zip(wanted, rgb.frames(wanted), strict=True)
    elif reader:
        source = ((t - first, frame) for t, frame in reader.frames_at([first + t for t in wanted]))
    else:
        # at the rate that its flow was made at
        source = frames_at(video.path, wanted, flow.header.get("fps", 0), len(flow) + 1)
    last = None
    for (t, frame), planes in zip(source, flow.frames(wanted), strict=False):
        yield t, frame, planes
        last = t
    if last != wanted[-1]:
        raise BadInput(f"{video.path} has fewer frames than its flow {flow.path}; has it changed? Remove the flow "
                       f"and run again: {flow.command}")
    if rgb is None and longer_than_its_flow(video.path, flow):
        raise BadInput(f"{video.path} has {file_stat(video.path)[0]} bytes, but its flow {flow.path} is that of a "
                       f"shorter video of {flow.header['source_bytes']}; has it changed? Run again: {flow.command}")


def longer_than_its_flow(path, flow):
    """Whether a video is another file, by its bytes, than its flow was made from, and declares more frames. The same
    film encoded anew may keep its flow; of imported flow the header may not know the video."""
    header, size = flow.header, flow.header.get("source_bytes")
    if size in (None, header.get("images_bytes")) or size == file_stat(path)[0]:
        return False
    frames = max(len(flow) + 1, header.get("source_frames", 0), header.get("source_declared") or 0)
    return declared_frames(path, header.get("fps", 0)) > frames


def shape_of_film(flow):
    """(H, W) of the frames that a flow is of; that of its planes where it doesn't say."""
    h, w = flow.shape
    return tuple(flow.header.get("source_size", (w, h // 2)))[::-1]
