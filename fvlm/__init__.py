"""fvlm: predict a video's next frame in a space better than pixels, and find out whether it worked."""
__version__ = "0.1.0"
