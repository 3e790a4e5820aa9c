"""Draw the figures of README into `docs/images`: python docs/draw_readme.py"""

from sitegen.figures import README, draw_charts

if __name__ == "__main__":
    draw_charts(README)
