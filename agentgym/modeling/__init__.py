"""What engine and learner share: models, tokenizers, the renderer, log-probs. The only torch in the core.

    tokenizer = tokenizer.closed_vocabulary(words)       # or train_bpe(texts, 4096)
    model = build.tiny(len(tokenizer))                   # or build.load(path)
    renderer = renderer.Renderer(tokenizer)              # chat messages -> ids, once
    logprobs.token_logprobs(model, batch)                # packed, chunked, with gradient

Importing this package imports nothing; its modules need the extra [train].
"""
