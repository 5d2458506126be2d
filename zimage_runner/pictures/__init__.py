"""Pictures that items start from: opened and checked, fitted to the size that is drawn, masks, what is kept of them.

Importing the room imports neither Pillow nor torch.
"""
