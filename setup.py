"""One package, `lm`; extras per backend and per purpose."""
import setuptools

setuptools.setup(
    name='lm',
    version='0.1.0',
    description='Language models around their training objective, in JAX and Flax',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['lm', 'lm.*']),
    package_data={'lm.evaluate.people': ['page.html'], 'lm.serve': ['chat_page.html']},
    install_requires=[
        'jax>=0.10',                # explicit sharding, jax.set_mesh, jax.shard_map
        'flax>=0.12',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8',
        'numpy>=2.0',
        'scipy>=1.14',              # Student's t; jax brings it anyway
        'absl-py>=2.3',
        'sentencepiece>=0.2.1',
        'ftfy>=6.3',                # broken Unicode
        'tensorflow-datasets>=4.9.10',
        'importlib_resources',      # which tensorflow-datasets imports and does not ask for
        'array_record>=0.8',        # TFDS data without TensorFlow
        'pyarrow>=18',              # Parquet; tensorflow-datasets brings it anyway
    ],
    extras_require={
        'cuda': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
        'zstd': ['zstandard>=0.23'],
        'quantized': ['qwix>=0.1.8'],   # products of 8 bits
        'tokenizers': ['tokenizers>=0.21'],
        'hf': [
            'tokenizers>=0.21',     # tokenizer.json files
            'jinja2>=3.1.6',        # chat templates; below, ways out of its sandbox are known
            'huggingface_hub>=0.30',  # models by their id
        ],
        'stopwords': ['stopwordsiso>=0.6', 'jieba>=0.42'],
        'plot': ['matplotlib>=3.9'],
        'sweep': ['optuna>=4.4', 'matplotlib>=3.9'],   # grid, random and halving searches that resume
        'eval': ['sacrebleu>=2.5', 'rouge-score>=0.1.2', 'lm_eval>=0.4.13'],   # BLEU, chrF, TER, ROUGE; tasks
        'human': ['starlette>=0.47', 'uvicorn>=0.34'],   # the web page of experiments/human_eval.py
        # The server of experiments/serve.py.
        'serve': ['starlette>=0.47', 'uvicorn>=0.34', 'prometheus_client>=0.22', 'jinja2>=3.1.6',
                  'llguidance>=1.6.1'],   # answers that match a schema
        # experiments/tour.ipynb, and to run it without a browser.
        'notebook': ['nbclient>=0.10', 'ipykernel>=6.29', 'matplotlib>=3.9', 'tokenizers>=0.21'],
        # What the benchmark measures against; the CPU builds are enough.
        'benchmark': ['torch>=2.9', 'transformers>=5.0'],
        'test': [
            'pytest>=8', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'ruff>=0.9', 'tokenizers>=0.21', 'zstandard>=0.23',
            'stopwordsiso>=0.6', 'jieba>=0.42', 'matplotlib>=3.9', 'safetensors>=0.5', 'setuptools', 'optuna>=4.4',
            'qwix>=0.1.8',
            'tensorboardX>=2.6',    # another writer of event files
            'jinja2>=3.1.6',        # chat templates
            'sacrebleu>=2.5', 'rouge-score>=0.1.2',   # metrics of texts
            'starlette>=0.47', 'uvicorn>=0.34', 'httpx>=0.28',   # web pages, and a client of them
            'prometheus_client>=0.22', 'openai>=2.0',   # the server, and a client of it
            'llguidance>=1.6.1',    # answers that match a schema
        ],
    },
)
