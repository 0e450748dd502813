"""What file compressors make of a text, in bits per byte."""



def compress(text: bytes, training_text: bytes) -> dict[str, tuple[float, float]]:
  """Of gzip -9, bzip2 -9 and xz -9: bits per byte of `text` alone, and primed with training text.

  Primed: gzip with the last 32 KiB as its dictionary (its window), bzip2 with as much as fits in a block of 900 kB
  before the text, xz with all of it; counted is what the text adds to the size of the training text compressed.
  """
  import bz2
  import lzma
  import zlib

  def deflate(data, prime=b''):
    # 31 is gzip's format, which has no dictionaries; -15 is the same stream without its 18 bytes of frame.
    packer = zlib.compressobj(9, wbits=-15, zdict=prime) if prime else zlib.compressobj(9, wbits=31)
    return len(packer.compress(data) + packer.flush())

  def xz(data):
    return len(lzma.compress(data, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': 1 << 28}]))

  room = max(900_000 - len(text), 0)
  block = training_text[-room:] if room else b''
  sizes = {
      'gzip -9': (deflate(text), deflate(text, training_text[-(1 << 15):])),
      'bzip2 -9': (len(bz2.compress(text)), len(bz2.compress(block + text)) - len(bz2.compress(block))),
      'xz -9': (xz(text), xz(training_text + text) - xz(training_text))}
  return {name: (8 * alone / len(text), 8 * primed / len(text)) for name, (alone, primed) in sizes.items()}
