"""What the stages stand on; a first reading of the method may skip it. One subject a file.

Stages import the method (goca, tvl1), model, data and support; data and model import support; nothing imports a stage.
Of support, the files about networks import model and data, and flow_methods the method
(tests/support/test_imports.py).

Commands and files
    errors          what the user can mend: BadInput and exit statuses
    cli             messages and exit statuses of a command, the layout of its help
    files           written whole or not at all, checked when loaded: .npz with a JSON header
    locks           one process at a time: a run's folder, an index, a fine-tuning
    avi             motion-JPEG AVI, the files of the stores
    stores          the stores of flow and of RGB; flow in 8 bits
    checkpoints     a run's checkpoints: saved, rotated, resumed from
Videos
    videos          which files there are, and their frames
    frame_folders   folders of images as videos
    streams         time stamps and changes of size, which OpenCV doesn't give
    seeking         frames far into a film, decoded from a key frame on
    video_index     how many frames each really gives (python -m support.video_index)
    datasets        the published lists of data sets: which videos, which labels
    frames          frames of a video with its flow, from the stores or decoded
    crops           squares cut out of them: the pixels of clips
    epoch_batches   which videos make a batch, in any number of processes
    loader          clips through torch's DataLoader, when any file may crash its reader
    worker_pool     many files in processes, when any may crash, stall or fill the memory
Optical flow (stage 1)
    flow_methods    TV-L1, DIS, Farneback and their parameters; which backend and device
    flow_pipeline   one video from file to store
    flow_gpu        many videos at once on a GPU
    flow_progress   how far it is, how long it will take, how large the stores will be
    flow_info       what a store holds, and a picture of a field
    flow_import     flow that another program left as JPEGs
    segments        long videos that were cut: a sample of each piece
Training (stage 3)
    training_flags  the flags of pretrain.py
    run             the one training loop: logging, signals, saving, stopping around a step
    optim           LARS, AdamW, SGD; steps dropped where a gradient is not finite; the learning rate
    training_log    RUN/log.jsonl, the terminal, warnings of collapse
    memory          what a step keeps, reckoned before it is taken
    signals         signals that ask a run to stop, the clock that asks it to save
    distributed     several processes: how they start, what they share and must have alike
    batch_norm      batch norm over the whole batch
    watchdog        hung and lost processes
Evaluation (stage 4)
    evaluation_flags  the flags of evaluate.py
    features        features of every video of a list, extracted once and kept
    inference       test clips through a network, averaged by video
    classifiers     linear probe and fine-tuning
    metrics         nearest neighbours, R@k, accuracy, Acc, NMI and F1 of clusters
    kmeans          k-means, all restarts as one batch
    reporting       the protocol in words, tables by view and by class
    weights         other people's weights, and exports of ours
Use (stage 5)
    previews        eight frames of a film as one small picture that plays
    projection      features in two dimensions, for a map
    page            a page of films that opens by double click; its scripts and styles are in page_assets/
    collection_index  features of every film of a folder, or of its pieces: what is new, what changed
    grouping        groups of a collection by k-means, and how far they can be trusted
    approximate     nearest neighbours by FAISS, for collections of 10^5 and more
"""
