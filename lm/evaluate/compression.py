"""Bits per byte of a text by file compressors, a baseline for language models."""


def compress(text: bytes, training_text: bytes) -> dict[str, tuple[float, float]]:
  """Returns bits per byte of `text` by gzip -9, bzip2 -9 and xz -9: (alone, primed with training text) by name.

  gzip is primed with the last 32 KiB (its window) as its dictionary. bzip2 and xz compress training text and `text`
  together, from which the size of the compressed training text is subtracted: bzip2 with the training text that fits
  into its block of 900 kB before `text`, xz with all of it.
  """
  import bz2
  import lzma
  import zlib

  def deflate(data, prime=b''):
    # 31 selects gzip's format, which has no dictionaries; -15 is the same stream without gzip's 18 bytes of header.
    compressor = zlib.compressobj(9, wbits=-15, zdict=prime) if prime else zlib.compressobj(9, wbits=31)
    return len(compressor.compress(data) + compressor.flush())

  def xz(data):
    return len(lzma.compress(data, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': 1 << 28}]))

  available = max(900_000 - len(text), 0)
  block = training_text[-available:] if available else b''
  sizes = {
      'gzip -9': (deflate(text), deflate(text, training_text[-(1 << 15):])),
      'bzip2 -9': (len(bz2.compress(text)), len(bz2.compress(block + text)) - len(bz2.compress(block))),
      'xz -9': (xz(text), xz(training_text + text) - xz(training_text))}
  return {name: (8 * alone / len(text), 8 * primed / len(text)) for name, (alone, primed) in sizes.items()}
