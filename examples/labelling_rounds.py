"""Rounds of labelling with a Session, which remembers what is labelled and what is out with annotators."""

import json

import numpy as np

from queryselect import Client, Session

embeddings = np.random.default_rng(0).normal(size=(1000, 32)).astype(np.float32)

with Client("local:") as client:  # or Client("localhost:50051")
    session = Session(client, "k_center_greedy", embeddings=embeddings)
    first = session.next(budget=5)
    print("please label", first.indices.tolist())

    session.label(first.indices[:4])  # four came back labelled,
    session.release(first.indices[4])  # one annotator gave up

    saved = json.dumps(session.state())  # between rounds the state fits a file or a database
    session = Session.load(json.loads(saved), client, embeddings=embeddings)
    second = session.next(budget=5)
    print("then label ", second.indices.tolist())
    assert not set(second.indices) & set(first.indices[:4])
