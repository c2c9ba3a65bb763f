import subprocess
import sys

OLD = """
import sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from mlvision.labels.store import LabelMapStore
    import mlvision.labels.oracle as oracle
    from mlvision.labels import pool_label_map
import mlvision.label_maps, mlvision.label_maps.oracle
assert LabelMapStore is mlvision.label_maps.LabelMapStore
assert oracle is mlvision.label_maps.oracle
assert pool_label_map is mlvision.label_maps.pool_label_map
print([str(w.message) for w in said if issubclass(w.category, DeprecationWarning) and "mlvision" in str(w.message)])
"""


def test_the_name_of_version_0_1_still_works_and_warns_once():
    done = subprocess.run([sys.executable, "-c", OLD], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['mlvision.labels is now mlvision.label_maps']\n"), done.stderr
