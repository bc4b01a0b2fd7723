"""Writes this folder's checkpoints with TensorFlow's own saver. Not a test: it needs TensorFlow.

Environment: Python 3.11, tensorflow-cpu 2.21.0, numpy. Run ``python make.py`` in this folder.

Two checkpoints of a GPT-2 of 2 layers, with the names and shapes of https://github.com/openai/gpt-2 (src/model.py):
``124M`` in float32 and one file of data, as OpenAI published theirs; ``sharded`` in float16 and two, with the slots of
an optimizer and a step counter, as programs for fine-tuning leave them. ``expected.npz`` holds the values and what
the network below, in TensorFlow, computes of them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
HIDDEN, LAYERS, HEADS, CONTEXT = 16, 2, 2, 12
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]


def byte_letters() -> list[str]:
    """The printable letter that GPT-2 writes for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(others))]


def tokenizer(folder: Path) -> int:
    words = [*byte_letters(), *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(words)


def weights(vocab: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed)
    shapes: dict[str, tuple[int, ...]] = {"model/wpe": (CONTEXT, HIDDEN), "model/wte": (vocab, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "ln_1/g": (HIDDEN,),
            "ln_1/b": (HIDDEN,),
            "attn/c_attn/w": (1, HIDDEN, 3 * HIDDEN),
            "attn/c_attn/b": (3 * HIDDEN,),
            "attn/c_proj/w": (1, HIDDEN, HIDDEN),
            "attn/c_proj/b": (HIDDEN,),
            "ln_2/g": (HIDDEN,),
            "ln_2/b": (HIDDEN,),
            "mlp/c_fc/w": (1, HIDDEN, 4 * HIDDEN),
            "mlp/c_fc/b": (4 * HIDDEN,),
            "mlp/c_proj/w": (1, 4 * HIDDEN, HIDDEN),
            "mlp/c_proj/b": (HIDDEN,),
        }.items():
            shapes[f"model/h{layer}/{name}"] = shape
    shapes |= {"model/ln_f/g": (HIDDEN,), "model/ln_f/b": (HIDDEN,)}
    return {
        name: ((1.0 if name.endswith("/g") else 0.0) + 0.3 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def logits(w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """GPT-2, in TensorFlow: [S] ▶ [S, V]."""

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean = tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), -1, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + 1e-5) * w[f"{name}/g"] + w[f"{name}/b"]

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.matmul(x, w[f"{name}/w"][0]) + w[f"{name}/b"]

    length = len(tokens)
    hidden = tf.gather(w["model/wte"], tokens) + w["model/wpe"][:length]
    mask = tf.linalg.band_part(tf.ones((length, length)), -1, 0)
    for layer in range(LAYERS):
        block = f"model/h{layer}"
        qkv = tf.reshape(dense(norm(hidden, f"{block}/ln_1"), f"{block}/attn/c_attn"), (length, 3, HEADS, -1))
        query, key, value = (tf.transpose(qkv[:, part], (1, 0, 2)) for part in range(3))
        scores = tf.matmul(query, key, transpose_b=True) / math.sqrt(HIDDEN // HEADS)
        mixed = tf.matmul(tf.nn.softmax(tf.where(mask > 0, scores, -1e10)), value)
        hidden += dense(tf.reshape(tf.transpose(mixed, (1, 0, 2)), (length, HIDDEN)), f"{block}/attn/c_proj")
        inner = tf.nn.gelu(dense(norm(hidden, f"{block}/ln_2"), f"{block}/mlp/c_fc"), approximate=True)
        hidden += dense(inner, f"{block}/mlp/c_proj")
    return tf.matmul(norm(hidden, "model/ln_f"), w["model/wte"], transpose_b=True).numpy()


def save(folder: Path, values: dict[str, np.ndarray], *, shards: int) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        for number, (name, value) in enumerate(values.items()):
            with tf.device(f"/cpu:{number % shards}"):
                v1.get_variable(name, initializer=tf.constant(value), use_resource=False)
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": shards})) as session:
            session.run(v1.global_variables_initializer())
            saver = v1.train.Saver(sharded=shards > 1, save_relative_paths=True)
            saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def main() -> None:
    tokens = np.array([5, 17, 260, 0, 99, 42, 7])
    expected: dict[str, np.ndarray] = {"tokens": tokens}
    for name, seed in (("124M", 1), ("sharded", 2)):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        vocab = tokenizer(folder)
        hparams = {"n_vocab": vocab, "n_ctx": CONTEXT, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS}
        (folder / "hparams.json").write_text(json.dumps(hparams))
        values = weights(vocab, seed)
        if name == "sharded":
            values = {key: value.astype(np.float16) for key, value in values.items()}
            slots = {"model/ln_f/g/Adam": np.zeros(HIDDEN, np.float16), "global_step": np.array(7, np.int64)}
            save(folder, values | slots, shards=2)
        else:
            save(folder, values, shards=1)
        expected[f"{name}/logits"] = logits({key: value.astype(np.float32) for key, value in values.items()}, tokens)
        expected |= {f"{name}/{key}": value for key, value in values.items()}
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
