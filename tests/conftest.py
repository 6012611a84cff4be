"""What every test may be asked on the command line."""


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="the whole of a product that is else covered")
    parser.addoption(
        "--new-pictures",
        action="store_true",
        help="write what screenshots are compared with anew (tests/recipes/report/test_browser.py)",
    )
