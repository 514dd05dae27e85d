"""Samples of long videos: `flow.py --segment` cuts them in the stores, `expand` makes a sample of each piece."""

from support.errors import BadInput


def _flag(key, value):
    return f"--{key} {value:g}" if value else f"no --{key}"


def expand(videos, store, rgb=None, frames=True):
    """Videos -> videos: in place of each that `store` holds in segments, one for each, NAME@FIRSTFRAME, its label kept.

    store: the FlowStore, or the RgbStore where only RGB is looked at. rgb: the RgbStore, or None. frames: whether RGB
    is looked at. Raises BadInput where the two were not cut alike, or frames are needed but no RGB store is there:
    those of a segment can't be read from the video by their number.
    """
    for key in ("segment", "fps"):
        own, other = (each.header.get(key) for each in (store, rgb or store))
        if own != other:
            raise BadInput(f"{store.root} was made with {_flag(key, own)}, but {rgb.root} with {_flag(key, other)}: "
                           f"their frames are not the same; make both by one command (flow.py --out ... --rgb ...)")
    names = {video.name: [] if video.name in store else store.segments(video.name) for video in videos}
    cut = next((video for video in videos if names[video.name]), None)
    if frames and rgb is None and cut:
        raise BadInput(f"{store.root} holds {cut.name} in segments, whose pictures are read from an RGB store: add "
                       f"--rgb RGB (made with python flow.py --videos DIR --out {store.root} --rgb RGB and the same "
                       f"--segment)")
    return [video._replace(name=name, first=int(name.rpartition("@")[2]) if cut else 0) for video in videos
            for cut in [names[video.name]] for name in cut or [video.name]]
