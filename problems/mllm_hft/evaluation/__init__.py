"""What a model is asked after training, and what is measured of its answers.

`questions` asks, `measures` counts (POPE, CHAIR, the modality gap),
`evaluation_split` holds a split with both,
`evaluator` measures a model on it, `figure` draws. Nothing is trained here.
"""
