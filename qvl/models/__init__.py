"""Networks and their weights: tensors, not requests. Its files, in the best order to read them:

    registry                                which class computes which architecture
    qwen2_vl vision                         the network: decoder, and tower
    preprocess                              what goes into the tower
    one_row cpu_decoder                     the decoder's layers for steps of few rows, faster
    weights safetensors_file parameters     a checkpoint's tensors into the network's memory

A further model is one more file and one more line in `registry`.
"""
