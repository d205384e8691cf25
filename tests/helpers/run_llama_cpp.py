"""
llama.cpp on pictures, in an interpreter of its own that has llama-cpp-python:

    python run_llama_cpp.py model.gguf mmproj.gguf request.npz answer.npz

The request has the pictures `image_0`, `image_1`, ... as RGB values, the token ids `before` and `after` an image, and
the number of `new_tokens`. The answer has the `embeddings` and the greedy `tokens` of each picture.
"""

import ctypes
import sys

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd


def image_chunk(context: int, image: np.ndarray) -> tuple[int, int]:
    """The chunk of the image, and the list of chunks that owns it."""
    pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(np.ascontiguousarray(image))
    bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
    text = mtmd.mtmd_input_text()
    text.text = mtmd.mtmd_default_marker()
    text.text_len = len(text.text)
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    mtmd.mtmd_bitmap_free(bitmap)
    found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
    (chunk,) = [one for one in found if mtmd.mtmd_input_chunk_get_type(one) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
    return chunk, chunks


def greedy_tokens(llama: llama_cpp.Llama, context: int, chunk: int, request: dict) -> list[int]:
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.eval(request["before"].tolist())
    position = llama_cpp.llama_pos(0)
    start, sequence = llama_cpp.llama_pos(llama.n_tokens), llama_cpp.llama_seq_id(0)
    result = mtmd.mtmd_helper_eval_chunk_single(
        context, llama._ctx.ctx, chunk, start, sequence, llama.n_batch, False, ctypes.byref(position)
    )
    assert result == 0
    llama.n_tokens = position.value
    tokens, step = [], request["after"].tolist()
    while len(tokens) < request["new_tokens"]:
        llama.eval(step)
        logits = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
        step = [int(np.argmax(logits[: llama.n_vocab()]))]
        tokens += step
    return tokens


def main(model: str, projector: str, source: str, dest: str) -> None:
    request = dict(np.load(source))
    llama = llama_cpp.Llama(model, n_ctx=1024, verbose=False)
    settings = mtmd.mtmd_context_params_default()
    settings.use_gpu, settings.warmup = False, False
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = mtmd.mtmd_init_from_file(projector.encode(), llama.model, settings)
    assert context is not None, "mtmd cannot load the projector"
    embeddings, tokens = [], []
    for index in range(sum(name.startswith("image_") for name in request)):
        chunk, owner = image_chunk(context, request[f"image_{index}"])
        assert mtmd.mtmd_encode_chunk(context, chunk) == 0
        shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), llama.n_embd()
        output = mtmd.mtmd_get_output_embd(context)
        embeddings.append(np.ctypeslib.as_array(output, shape=shape).copy())
        tokens.append(greedy_tokens(llama, context, chunk, request))
        mtmd.mtmd_input_chunks_free(owner)
    mtmd.mtmd_free(context)
    np.savez(dest, embeddings=np.stack(embeddings), tokens=np.array(tokens), version=llama_cpp.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
