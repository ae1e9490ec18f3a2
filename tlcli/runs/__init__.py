"""The run directory.

    config.yaml            every option, resolved: `tlcli finetune --config RUN/config.yaml` repeats the run
    run.json               what the run is: status, versions, data, classes, backbone, head, metrics
    metrics.jsonl          one line for each head of the grid, or each epoch
    checkpoints/           until the run is done: what --resume continues from (training/checkpoints.py)
    model.safetensors      with config.json the trained network, in timm's format
    head.safetensors       the head, where it is not the network's own linear classifier
    evaluation-SPLIT.json  predictions-SPLIT.csv  bad_images.csv  README.md  report.html

Files are published whole or not at all. A directory can be moved. There is no pickle.
"""
