"""Films with bit flips, cuts and swapped headers."""




def mutate(blob, rng):
    """Flip bits, cut, blank, repeat or swap pieces of a file."""
    blob = bytearray(blob)
    kind = rng.integers(5)
    if kind == 0:  # bit flips
        for at in rng.integers(0, len(blob), rng.integers(1, 200)):
            blob[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del blob[int(rng.integers(len(blob))):]
    elif kind == 2:  # the header, where the sizes stand
        for at in rng.integers(0, min(len(blob), 400), rng.integers(1, 8)):
            blob[at] = int(rng.integers(256))
    elif kind == 3:
        a, b = sorted(rng.integers(0, len(blob), 2).tolist())
        blob[a:b] = bytes(b - a)
    else:
        a = int(rng.integers(1, len(blob)))
        blob = blob[a:] + blob[:a]
    return bytes(blob)
