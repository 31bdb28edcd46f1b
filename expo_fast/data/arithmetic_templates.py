"""The texts of the built-in arithmetic word problems, by level.

A template is a question and, on the following lines, the steps of its solution. `[m * n = x]` in a
step computes x, and reads "4 * 6 = 24". The letters that no step computes are drawn: see
`arithmetic.RANGES`. Words in braces are drawn too: see `arithmetic._draw_words`.
"""

TEMPLATES = {
    1: """
{A} has {a} {items}. {B} gives {him} {b} more. How many {items} does {A} have now?
{A} now has [a + b = x] {items}.

{A} has {a} {items} and gives {b} of them to {B}. How many {items} does {A} have left?
{A} has [a - b = x] {items} left.

There are {a} {items} on a table and {b} {items} on a shelf. How many {items} are there in all?
In all there are [a + b = x] {items}.

{A} picked {a} {fruits} and used {b} of them for a cake. How many {fruits} are left?
There are [a - b = x] {fruits} left.

{A} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {he} read in all?
In all {A} read [a + b = x] pages.

{A} drives a bus with {a} passengers. At the next stop {b} more get on, and nobody gets off. \
How many passengers does {A} have now?
{A} now has [a + b = x] passengers.

{A} has {a} dollars and buys a hat for {b} dollars. How many dollars does {he} have left?
{A} has [a - b = x] dollars left.

{A} found {a} {items} and {B} found {b} {items}. \
How many more {items} did {A} find than {B}?
{A} found [a - b = x] more {items} than {B}.
""",
    2: """
{A} has {m} {boxes} of {n} {items} and {a} loose {items}. \
How many {items} does {A} have in all?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
With the loose {items} that makes [x + a = y] {items}.

{A} buys {m} {boxes} with {n} {items} in each {box}. {He} gives {a} {items} to {B}. \
How many {items} does {A} have left?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
{A} has [x - a = y] {items} left.

{A} sets up {m} rows of {n} chairs in a hall. Then {B} brings in {a} more chairs. \
How many chairs are in the hall now?
{m} rows of {n} chairs are [m * n = x] chairs.
Now there are [x + a = y] chairs in the hall.

{A} works {m} hours for {n} dollars an hour and then spends {a} dollars. \
How many of the dollars does {he} have left?
In {m} hours {A} earns [m * n = x] dollars.
{He} has [x - a = y] dollars left.

{A} buys {m} tickets for {n} dollars each and a drink for {a} dollars. \
How many dollars does {A} spend?
{m} tickets for {n} dollars each cost [m * n = x] dollars.
With the drink {A} spends [x + a = y] dollars.

{A} reads {n} pages a day for {m} days. Then {he} has {a} pages left to read. \
How many pages does the book have?
In {m} days {A} reads [m * n = x] pages.
The book has [x + a = y] pages.

On {A}'s farm {m} children pick {n} {fruits} each. They eat {a} of the {fruits}. \
How many {fruits} are left?
{m} children with {n} {fruits} each pick [m * n = x] {fruits}.
There are [x - a = y] {fruits} left.

{A} has {a} {items}, and {B} has {times} as many. How many {items} do they have together?
{B} has {times} as many, which is [f * a = x] {items}.
Together they have [x + a = y] {items}.
""",
    3: """
{A} has {m} {boxes} of {n} {items}. {He} gives {a} {items} to {B} and then finds {b} more. \
How many {items} does {A} have now?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
After the gift {A} has [x - a = y] {items}.
With the ones {he} finds {A} has [y + b = z] {items}.

{A}'s shop has {a} {items}. It gets {m} {boxes} of {n} {items} and then sells {b} {items}. \
How many {items} does the shop have now?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
With them the shop has [a + x = y] {items}.
After the sale it has [y - b = z] {items}.

{A} saves {n} dollars a week for {m} weeks. {B} gives {him} {a} dollars, \
and {he} spends {b} dollars on a game. How many dollars does {A} have now?
In {m} weeks {A} saves [m * n = x] dollars.
With the gift {he} has [x + a = y] dollars.
After buying the game {he} has [y - b = z] dollars.

{A} drives a train that has {m} cars with {n} passengers in each car. At a station {a} passengers \
get off and {b} get on. How many passengers are on the train now?
{m} cars of {n} passengers are [m * n = x] passengers.
After some get off, there are [x - a = y] passengers.
After others get on, there are [y + b = z] passengers.

{A} bakes {m} trays of {n} muffins. {His} family eats {a} of them, and {B} brings {b} more. \
How many muffins are there now?
{m} trays of {n} muffins are [m * n = x] muffins.
After the family eats there are [x - a = y] muffins.
With those that {B} brings there are [y + b = z] muffins.

{A} has {t} dollars. {He} buys {m} tickets for {n} dollars each and a drink for {a} dollars. \
How many dollars does {A} have left?
{m} tickets for {n} dollars each cost [m * n = x] dollars.
With the drink {A} spends [x + a = y] dollars.
{He} has [t - y = z] dollars left.

A garden has {m} rows of {n} roses. {A} cuts {a} of the roses and plants {b} new ones. \
How many roses are in the garden now?
{m} rows of {n} roses are [m * n = x] roses.
After the cut there are [x - a = y] roses.
With the new ones there are [y + b = z] roses.

{A} has {a} {items}. {B} had {times} as many, but lost {b} of them. \
How many {items} do they have together?
{B} had {times} as many, which is [f * a = x] {items}.
After the loss {B} has [x - b = y] {items}.
Together they have [y + a = z] {items}.
""",
    4: """
{A} has {m} {boxes} of {n} {items} and {a} loose {items}. {He} loses {b} of all these {items} \
and shares the rest equally among {k} friends. How many {items} does each friend get?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
With the loose {items} that makes [x + a = y] {items}.
After the loss {A} has [y - b = z] {items}.
Each of the {k} friends gets [z / k = w] {items}.

{A} buys {m} {boxes} of {n} {foods}, and {B} buys {k} {boxes} of {j} {foods}. \
Together they eat {a} {foods}. How many {foods} are left?
{A} buys [m * n = x] {foods}.
{B} buys [k * j = y] {foods}.
Together they have [x + y = z] {foods}.
There are [z - a = w] {foods} left.

{A} has {t} dollars. {He} buys {m} books for {n} dollars each and {k} pens for {j} dollars each. \
How many dollars does {A} have left?
The books cost [m * n = x] dollars.
The pens cost [k * j = y] dollars.
Together they cost [x + y = z] dollars.
{A} has [t - z = w] dollars left.

{A} picks {n} {fruits} from each of {m} trees. {He} throws {a} bad ones away and buys {b} more. \
Then {he} puts all the {fruits} into {boxes} of {k}. How many {boxes} does {he} fill?
From {m} trees {A} picks [m * n = x] {fruits}.
Without the bad ones there are [x - a = y] {fruits}.
With the new ones there are [y + b = z] {fruits}.
They fill [z / k = w] {boxes}.

A book has {t} pages. {A} reads {n} pages a day for {m} days and then {a} pages on Sunday. \
{He} reads the rest in {k} days, the same number of pages each day. \
How many pages a day does {A} read at the end?
In the first {m} days {A} reads [m * n = x] pages.
With Sunday that makes [x + a = y] pages.
There are [t - y = z] pages left.
In {k} days {A} reads [z / k = w] pages a day.

{A} works {m} hours for {n} dollars an hour and gets {a} dollars more as a tip. \
{B} works {k} hours for {j} dollars an hour. How many more dollars does {A} get than {B}?
For the hours {A} earns [m * n = x] dollars.
With the tip {he} gets [x + a = y] dollars.
{B} earns [k * j = z] dollars.
{A} gets [y - z = w] dollars more.

{A} plans a trip for {m} classes of {n} children. On the day {a} children are ill and stay at \
home, and {b} parents come along. Each van takes {k} people. How many full vans do they need?
{m} classes of {n} children are [m * n = x] children.
Without the ill ones there are [x - a = y] children.
With the parents there are [y + b = z] people.
They need [z / k = w] vans.
""",
    5: """
{A} has {m} {boxes} of {n} {items}. {He} gives {fraction} of the {items} to {B}, \
who already has {a}, and then gives {b} {items} to {C}. \
How many more {items} does {A} have than {B} now?
{m} {boxes} of {n} {items} are [m * n = x] {items}.
{B} gets {fraction} of them, which is [x / d = y] {items}.
{A} then has [x - y = z] {items}.
After the gift to {C} {he} has [z - b = w] {items}.
{B} now has [a + y = v] {items}.
{A} has [w - v = u] more {items} than {B}.

{A}'s shop has {t} {items}. It sells {percent}% of them on Monday and {fraction} of the rest on \
Tuesday. Then it gets {m} {boxes} of {n} {items}. How many {items} does the shop have now?
{percent}% is {part}, so on Monday the shop sells [t / p = x] {items}.
After Monday it has [t - x = y] {items}.
On Tuesday it sells {fraction} of them, which is [y / d = z] {items}.
After Tuesday it has [y - z = w] {items}.
The {m} new {boxes} hold [m * n = v] {items}.
Now the shop has [w + v = u] {items}.

{A} works {m} hours for {n} dollars an hour and spends {fraction} of the money on food. \
{B} has {times} as many dollars as {A} has left. How many dollars do they have together?
In {m} hours {A} earns [m * n = x] dollars.
The food costs {fraction} of that, which is [x / d = y] dollars.
{A} has [x - y = z] dollars left.
{B} has {times} as many, which is [f * z = w] dollars.
Together they have [z + w = v] dollars.

{A} teaches at a school with {m} classes of {n} children. To come to school {percent}% of the \
children walk, {fraction} of the others ride a bike, and the rest take the bus. \
How many more children take the bus than walk?
{m} classes of {n} children are [m * n = x] children.
{percent}% is {part}, so [x / p = y] children walk.
The others are [x - y = z] children.
Of these {fraction} ride a bike, which is [z / d = w] children.
The bus takes [z - w = v] children.
That is [v - y = u] more children than walk.

{A} has {t} dollars. {He} buys {m} books for {n} dollars each and {k} pens for {j} dollars each. \
The shop takes {percent}% off the total. How many dollars does {A} have left?
The books cost [m * n = x] dollars.
The pens cost [k * j = y] dollars.
The total is [x + y = z] dollars.
{percent}% is {part}, so the shop takes off [z / p = w] dollars.
{A} pays [z - w = v] dollars.
{He} has [t - v = u] dollars left.

A garden has {m} rows of {n} trees. Of these trees {fraction} are pear trees, and the others are \
plum trees. {A} cuts down {a} plum trees and plants {b} pear trees. \
How many more plum trees than pear trees are there now?
{m} rows of {n} trees are [m * n = x] trees.
The pear trees are {fraction} of them, which is [x / d = y] trees.
The plum trees are [x - y = z] trees.
After the cut there are [z - a = w] plum trees.
With the new ones there are [y + b = v] pear trees.
There are [w - v = u] more plum trees than pear trees.

{A} scores {a} points in a game. {B} scores {times} as many, and {C} scores {b} fewer than {B}. \
The rest of the team scores {fraction} of what these three score together. \
How many points does the whole team score?
{B} scores {times} as many, which is [f * a = x] points.
{C} scores [x - b = y] points.
{A} and {B} together score [a + x = z] points.
With {C} that makes [z + y = w] points.
The rest score {fraction} of that, which is [w / d = v] points.
The whole team scores [w + v = u] points.
""",
}
