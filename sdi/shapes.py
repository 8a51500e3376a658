"""The letters in which every tensor argument states its shape, defined once.

B   examples of a batch            N   training rows
T   tokens of a padded row         Q   queries
S   loop steps, also written τ     K   checkpoints
M   sketch dimension               D   parameters of a loop body, also written P
R,C rows and columns of one weight matrix as the parameter stores it
n   tokens of one row that meet one use of a parameter
"""
