// llama.cpp's logits of one sequence, for benchmarks/quality.py (benchmarks/README.md says how to build it).
//
//     peer_logits MODEL THREADS < int32 token ids > float32 logits [tokens][vocabulary]
//
// Everything is as llama-bench has it by default: prompt computed in batches of 512, repacked weights, KV cache in
// f16, flash attention "auto" (which means on for CPU), sliding-window layers with a small cache. A third argument
// "no-flash" turns flash attention off.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"

static void fail(const char * what) {
    std::fprintf(stderr, "peer_logits: %s\n", what);
    std::exit(1);
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fail("usage: peer_logits MODEL THREADS [no-flash] < tokens > logits");
    }
    std::vector<llama_token> tokens;
    for (int32_t token; std::fread(&token, sizeof token, 1, stdin) == 1;) {
        tokens.push_back(token);
    }
    if (tokens.empty()) {
        fail("no tokens on stdin");
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fail("cannot load the model");
    }
    const int32_t batch = 512;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens.size();
    params.n_batch = params.n_ubatch = batch;
    params.n_threads = params.n_threads_batch = std::atoi(argv[2]);
    params.type_k = params.type_v = GGML_TYPE_F16;
    params.swa_full = false;
    if (argc > 3 && !std::strcmp(argv[3], "no-flash")) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("cannot make a context");
    }
    const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch part = llama_batch_init(batch, 0, 1);
    for (size_t first = 0; first < tokens.size(); first += part.n_tokens) {
        part.n_tokens = tokens.size() - first < batch ? tokens.size() - first : batch;
        for (int32_t i = 0; i < part.n_tokens; i++) {
            part.token[i] = tokens[first + i];
            part.pos[i] = first + i;
            part.n_seq_id[i] = 1;
            part.seq_id[i][0] = 0;
            part.logits[i] = true;
        }
        if (llama_decode(context, part)) {
            fail("llama_decode failed");
        }
        const size_t count = part.n_tokens * vocabulary;
        if (std::fwrite(llama_get_logits(context), sizeof(float), count, stdout) != count) {
            fail("cannot write the logits");
        }
    }
    llama_batch_free(part);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
