"""What a model says at every decision of a fixed set of strings, on disk.

A layer of its own, above the models that it asks and below everything that reads a law instead of asking a model:
estimators, training, the verbs. It knows strings and laws only, neither files of examples nor losses.
"""
