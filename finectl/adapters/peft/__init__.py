"""Parameter-efficient tuning: few parameters are trained, the others stay those of the pre-trained model.

`table` says without torch what there is, what it takes and what it counts; `tuning` puts it into a model; one file a
method.
"""
