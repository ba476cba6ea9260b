interface Props {
  values: (number | null)[];
  label: string;
}

const WIDTH = 120;
const HEIGHT = 30;

/** The last two minutes as a line; gaps where there were no requests. */
export function Sparkline({ values, label }: Props) {
  const known = values.filter((value): value is number => value !== null);
  if (known.length < 2) return <svg class="spark" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} aria-hidden="true" />;
  const top = Math.max(...known, 1e-9);
  const bottom = Math.min(...known, 0);
  const x = (index: number) => (index / Math.max(1, values.length - 1)) * WIDTH;
  const y = (value: number) => HEIGHT - 2 - ((value - bottom) / (top - bottom || 1)) * (HEIGHT - 4);
  let path = "";
  let drawing = false;
  values.forEach((value, index) => {
    if (value === null) {
      drawing = false;
      return;
    }
    path += `${drawing ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    drawing = true;
  });
  return (
    <svg class="spark" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label={label}>
      <path d={path} vector-effect="non-scaling-stroke" />
    </svg>
  );
}
